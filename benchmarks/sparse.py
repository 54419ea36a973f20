"""What sparse weights cost in time: a product with dense weights, with torch's CSR, and with modicum's packed
form (unpacked each time); and a pruned model in both forms: bytes on disk, in memory, tokens a second. Run by
`make bench-prune`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import machine
import report
import torch
from torch import Tensor

import modicum
from modicum.weights import packed, save
from modicum.weights.pattern import Rows

SIZE = 2_048
SHARES = (0.5, 0.7, 0.9, 0.95)
BATCHES = (1, 32)


def once(fn: Callable[[], Any]) -> float:
    """Seconds of a call, of as many as fill a fiftieth of a second."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.02 or count < 3:
        fn()
        count += 1
    return (time.perf_counter() - start) / count


@torch.no_grad()
def measure(rounds: int) -> list[dict[str, Any]]:
    """Seconds of each form, in turns."""
    torch.manual_seed(0)
    found = []
    weight = torch.randn(SIZE, SIZE)
    for share in SHARES:
        mask = Rows(share).select(weight.abs())
        sparse = torch.where(mask, weight, 0.0)
        csr = sparse.to_sparse_csr()
        layer = packed.PackedLinear(packed.pack(mask), weight[mask], SIZE, None)
        for batch in BATCHES:
            x = torch.randn(batch, SIZE)
            forms: dict[str, Callable[[], Tensor]] = {
                "dense": lambda x=x, sparse=sparse: torch.nn.functional.linear(x, sparse),
                "CSR": lambda x=x, csr=csr: (csr @ x.T).T,
                "packed": lambda x=x, layer=layer: layer(x),
            }
            expected = forms["dense"]()
            for fn in forms.values():
                torch.testing.assert_close(fn(), expected, rtol=1e-4, atol=1e-3)
            for number in range(rounds):
                for name, fn in forms.items():
                    seconds = once(fn)
                    found.append(
                        {"share": share, "batch": batch, "form": name, "round": number, "seconds": seconds}
                    )
    return found


def forms(rounds: int) -> list[dict[str, Any]]:
    """The reference model pruned to 60 %, loaded in both forms: bytes, and seconds of 16 tokens, in turns."""
    torch.manual_seed(0)
    model, tokenizer = modicum.load("reference", dtype="float32")
    ids = torch.randint(0, 2_000, (4, 64))
    dense_file = packed.dense_bytes(model)
    made = modicum.prune(model, ids, sparsity=0.6, refine=None)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        size = save(made, model, tokenizer, folder)
        models: dict[str, Any] = {
            form: modicum.load(folder, dtype="float32", weights=form)[0] for form in ("dense", "packed")
        }
    for form, each in models.items():
        held = sum(x.nbytes for x in [*each.parameters(), *each.buffers()])
        found.append({"form": form, "disk": size, "dense_disk": dense_file, "held": held, "seconds": []})
    for _ in range(rounds):
        for row in found:
            start = time.perf_counter()
            models[row["form"]].generate(ids[:1], max_new_tokens=16, min_new_tokens=16, do_sample=False)
            row["seconds"].append(time.perf_counter() - start)
    return found


def section(raw: dict[str, Any]) -> str:
    """The tables, markers left out."""
    m = raw["machine"]
    head = ["removed", "batch", "dense, ms", "CSR ÷ dense", "packed ÷ dense", "CSR bytes", "packed bytes"]
    rows = []
    for share in SHARES:
        kept = SIZE * (SIZE - Rows(share).removed(SIZE))
        csr_bytes = (kept * 12 + (SIZE + 1) * 8) / (SIZE * SIZE * 4)  # torch's: int64 indices
        packed_bytes = packed.bits_and_values(SIZE, SIZE, kept, 4) / (SIZE * SIZE * 4)
        for batch in BATCHES:
            times = {
                form: [
                    x["seconds"]
                    for x in raw["times"]
                    if (x["share"], x["batch"], x["form"]) == (share, batch, form)
                ]
                for form in ("dense", "CSR", "packed")
            }
            ratios = []
            for form in ("CSR", "packed"):
                each = [a / b for a, b in zip(times[form], times["dense"], strict=True)]
                ratios.append(f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})")
            dense = f"{statistics.median(times['dense']) * 1e3:.2f}"
            sizes = [f"{csr_bytes:.0%}", f"{packed_bytes:.0%}"]
            rows.append([f"{share:.0%}", f"{batch}", dense, *ratios, *sizes])
    rounds = 1 + max(x["round"] for x in raw["times"])
    text = (
        f"Measured {raw['date']} on {m['cores']} cores ({m['processor']}), torch {torch.__version__}, one "
        f"layer of {SIZE:,} × {SIZE:,} in float32: medians of {rounds} rounds in turns, above 1 is slower "
        "than dense. Bytes are of the dense weight."
    )
    dense, small = raw["forms"]
    speeds = [statistics.median(16 / s for s in x["seconds"]) for x in (dense, small)]
    loaded = [
        [
            f'`weights="{x["form"]}"`',
            f"{x['disk'] / 2**20:.2f} MiB",
            f"{x['held'] / 2**20:.2f} MiB",
            f"{speed:.0f}",
        ]
        for x, speed in zip((dense, small), speeds, strict=True)
    ]
    model = (
        f"**`reference` at 60 %** in both forms, float32, 64 tokens and 16 new ones, median of {rounds} "
        f"rounds; its file before was {dense['dense_disk'] / 2**20:.2f} MiB (16 bits). Embeddings and "
        "output layer, a quarter of it, stay."
    )
    table = report.table(["", "file", "weights in memory", "tokens/s"], loaded)
    return "\n\n".join([text, report.table(head, rows), model, table])


def main() -> None:
    """Measure, write, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="one round; writes nothing")
    asked = parser.parse_args()
    started = datetime.now().astimezone()
    rounds = 1 if asked.quick else asked.rounds
    raw: dict[str, Any] = {"times": measure(rounds), "forms": forms(rounds)}
    raw |= machine.since(started)
    report.publish(raw, section, "sparse", keep=not asked.quick)


if __name__ == "__main__":
    main()
