"""What the CUDA kernels are compiled to, for every GPU that is served (tools/registers.py)."""

import pytest

import fakecuda
import registers

pytestmark = pytest.mark.skipif(not fakecuda.POSSIBLE, reason="needs a newer PyTorch for CUDA")
# Of the 65,536 registers of a multiprocessor: with 128 a thread, two blocks of 256 threads run.
MOST = 128


@pytest.mark.parametrize("T", [16, pytest.param(4, marks=pytest.mark.long)])
def test_kernels_stay_in_registers(T):
    rows = list(registers.table(["sm_90"], [T], ["float16"]))
    names = {row["kernel"] for row in rows}
    assert {
        "fire",
        "fire_backward",
        "pool",
        "pool_backward",
        "integrate",
        "integrate_backward",
    } <= names
    for row in rows:
        assert row["spills"] == row["stack"] == 0 and 8 <= row["registers"] <= MOST, row
        assert row["per_value"] is None or 4 < row["per_value"] < 80, row


@pytest.mark.long
@pytest.mark.parametrize("arch", registers.ARCHS)
@pytest.mark.parametrize("T", [1, 4, 16, 64])
def test_kernels_compile(arch, T):
    for row in registers.table([arch], [T], registers.TYPES):
        assert row["spills"] == row["stack"] == 0, row


def test_table_says_what_the_compiler_did():
    """A kernel that needs more registers than there are spills, and one that stores a number is short."""
    many = "".join(f"float v{i} = x[{i}];" for i in range(300))
    many += "__syncthreads();" + "".join(f"x[{i}] = v{i} * v{(i + 1) % 300};" for i in range(300))
    source = f"""extern "C" __global__ void large(float* x) {{ {many} }}
        extern "C" __global__ void small(float* x) {{ x[0] = 1.0f; }}
        extern "C" __global__ void looping(float* x, int n) {{
            #pragma unroll 1
            for (int i = 0; i < n; ++i) {{ {"x[i] = x[i] * x[i] + 1.0f; __syncthreads();" * 10} }}
        }}
        """
    for arch in ("sm_80", "sm_90"):
        found = registers.compiled(source, ("-std=c++17",), arch)
        assert set(found) == {"large", "small", "looping"}
        assert found["small"].loop == found["large"].loop == 0
        assert 40 <= found["looping"].loop < found["looping"].instructions < 100  # 10 x 4 and some
        assert found["large"].spills > 0 and found["large"].registers == 255
        assert found["small"].spills == 0 and found["small"].registers < 20
        assert 3 <= found["small"].instructions < 20 < 900 < found["large"].instructions
    with pytest.raises(RuntimeError, match="expected"):
        registers.compiled("int", ("-std=c++17",), "sm_90")
