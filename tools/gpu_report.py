"""Reads what tools/gpu.py has measured, whole or in part, and makes the tables of it."""

import json
from collections import Counter, defaultdict

NONE = "not measured"
# Published with MaxFormer (github.com/bic-L/MaxFormer).
A30 = (
    ("QKFormer-10-768, T 1, 32 images, an A30, published", 214, 18.2, 53, 5.0),
    ("Max-Former-10-768, T 1, 32 images, an A30, published", 179, 15.4, 44, 4.4),
)


def read(folder):
    """{measurement: {status, why, seconds, rows}} of the last time that each was made."""
    found = defaultdict(lambda: {"status": NONE, "why": "", "seconds": 0.0, "rows": []})
    for line in (folder / "results.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off, or empty
            continue
        item = row.pop("item")
        if row.get("status") == "started":
            found.pop(item, None)
        if "status" in row:
            found[item].update(row)
        else:
            found[item]["rows"].append(row)
    return found


def line(name, found):
    why = f": {found['why']}" if found["why"] else ""
    return f"{name:38} {found['seconds']:6.1f} s  {found['status']}{why}"


def pick(found, **wanted):
    """The last row that has these figures, or {}."""
    rows = [row for row in found["rows"] if wanted.items() <= row.items()]
    return rows[-1] if rows else {}


def cell(row, name, digits=1):
    return f"{row[name]:,.{digits}f}" if name in row else NONE


def ratio(row, ours, name="ms"):
    return f"{row[name] / ours[name]:.2f}x" if name in row and name in ours else NONE


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines) + "\n"


def tables(found, plan):
    """Markdown of all that is there; what is not there is said not to be measured."""
    facts = {key: value for row in found["environment"]["rows"] for key, value in row.items()}
    keys = ("name", "driver", "torch", "cuda", "triton", "spikingjelly", "date")
    said = "; ".join(f"{key} {facts[key]}" for key in keys if facts.get(key))
    if "name" not in facts or facts.get("small"):
        said += "; without a GPU, or --small: no figure below says anything of a GPU"
    parts = [f"{said}\n"]
    parts += [golden(found, plan), steps(found, plan), by_kernel(found, plan), graphs(found)]
    parts += [copies(found), tests(found)]
    bad = [
        f"- {line(item.name, found[item.name])}"
        for item in plan
        if found[item.name]["status"] != "done"
    ]
    parts += ["Not done:\n\n" + "\n".join(bad) + "\n"] if bad else []
    return "\n".join(parts)


def of_stage(found, plan, stage):
    return [(item.args, found[item.name]) for item in plan if item.stage == stage]


def golden(found, plan):
    rows = []
    keys = ("eval_logits", "train_logits", "grad_norms")
    for (name,), one in of_stage(found, plan, "golden"):
        for row in one["rows"]:
            if "way" in row:
                errors = (f"{row[key]:.1e}" for key in keys)
                rows.append([name, row["way"], row["dtype"], *errors])
        if not one["rows"]:
            rows.append([name, NONE, *[""] * 4])
    head = ["golden numbers: error of", "path", "type", "logits", "in training", "gradients"]
    return table(head, rows)


def steps(found, plan):
    rows, last, sizes = [], None, {}
    for (name, T, path), one in of_stage(found, plan, "step"):
        train, infer = pick(one, kind="train"), pick(one, kind="infer")
        sizes |= {row["what"]: None for row in one["rows"] if "what" in row}
        if path == "fast":
            ours = train, infer
        kernels = pick(one, kernels_of="train")
        what = f"{name.replace('QKFormer', 'HST').replace('_', '-')}, T {T}"
        rows.append([what if what != last else "", path])
        rows[-1] += [cell(train, "ms"), ratio(train, ours[0]), cell(train, "host_ms")]
        rows[-1] += [cell(kernels, "gpu_ms"), cell(kernels, "launches", 0), cell(train, "gb")]
        rows[-1] += [cell(infer, "ms"), ratio(infer, ours[1]), cell(infer, "gb")]
        last = what
    for name, train, train_gb, infer, infer_gb in A30:
        rows.append([name, "", train, "", "", "", "", train_gb, infer, "", infer_gb])
    head = ["; ".join(sizes), "path", "step, ms", "fast is", "host, ms", "kernels, ms"]
    return table([*head, "launches", "GB", "inference, ms", "fast is", "GB"], rows)


def by_kernel(found, plan):
    """The kernels that take most of our steps."""
    rows = []
    for (name, T, path), one in of_stage(found, plan, "step"):
        if path == "fast":
            for key, launches, ms in pick(one, kernels_of="train").get("kernels", [])[:8]:
                rows.append([f"{name}, T {T}", f"`{key[:60]}`", launches, f"{ms:.2f}"])
    return table(["kernels of a step, fast", "", "launches", "ms"], rows or [[NONE, "", "", ""]])


def graphs(found):
    rows = []
    for ranks in (1, 2):
        one = found[f"graphs {ranks}"]
        for kind in ("infer", "train"):
            same = pick(one, kind=kind, equal=True) or pick(one, kind=kind, equal=False)
            row = [f"{ranks} GPU{'s' * (ranks > 1)}", kind]
            for way in ("eager", "graph"):
                timed = pick(one, kind=kind, way=way)
                row += [cell(timed, "ms"), cell(timed, "host_ms")]
            rows.append([*row, {True: "yes", False: "no"}.get(same.get("equal"), NONE)])
    head = ["HST-10-384, T 4", "", "ms", "host", "by graphs, ms", "host", "same bits"]
    return table(head, rows)


def copies(found):
    by_name = defaultdict(list)
    for row in found["kernels"]["rows"]:
        if "kernel" in row:
            by_name[row["kernel"]].append(row)
    rows = []
    for name, ones in by_name.items():
        large = [row["copy_ms"] / row["ms"] for row in ones if row["mb"] >= 10]
        worst = f"{min(large):.2f}" if large else ""
        total, bare = (sum(row[key] for row in ones) for key in ("ms", "copy_ms"))
        rows.append([f"`{name}`", len(ones), f"{total:.2f}", f"{bare:.2f}", worst])
    head = ["kernel", "shapes", "ms of all", "a copy's", "slowest, of a copy's speed (10 MB up)"]
    return table(head, rows or [[NONE, "", "", "", ""]])


def tests(found):
    counts = Counter(row["outcome"] for row in found["tests"]["rows"] if "outcome" in row)
    said = ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items())
    return f"Tests for a GPU: {said or NONE}.\n"
