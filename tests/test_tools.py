"""tools/memory.py: what is counted is what autograd keeps, and grows as the paper says."""

import memory


def test_memory(tmp_path, capsys):
    figure = tmp_path / "memory.png"
    sizes = "--device cpu --side 16 32 48 --channels 64 --heads 2 --T 2".split()
    assert memory.main([*sizes, "--figure", str(figure)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[float(cell) for cell in line.split()] for line in lines if line[:7].strip().isdigit()]
    assert [row[0] for row in rows] == [256, 1024, 2304] and figure.stat().st_size > 10_000
    for _, token, token_measured, line, line_measured, square, square_measured in rows:
        assert (token, line, square) == (token_measured, line_measured, square_measured)
    small, large = rows[1:]  # 2.25 times the tokens
    assert abs(large[2] / small[2] - 2.25) < 0.02 and 2 < large[4] / small[4] < 2.25
    assert large[6] / small[6] > 4 and large[6] > 10 * large[2]
