"""int8 convolutions: noise of every scheme, and time beside onnxruntime, torch's quantised Conv1d and fp32.
One thread, about three minutes.

    python benchmarks/winograd.py            # writes docs/benchmarks_winograd.json and the tables
    python benchmarks/winograd.py --quick    # few rounds, one seed; writes nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import machine
import report
import torch
import winograd_peers as peers
from page import write_section
from torch import Tensor, nn

from modicum.errors import InputError
from modicum.measure import LatencyOracle, Spread, TimingSettings, interleaved
from modicum.quant import (
    Conv1dShape,
    ConvSettings,
    DirectInt8,
    ExactWinograd,
    IntegerConv1d,
    QuantConv1d,
    RangeLimitedWinograd,
    RangeSettings,
    RSQWinograd,
    TapwiseWinograd,
    calibrate,
    conv1d_oracle,
    counting,
    native_kernels,
    search_alphas,
    sqnr,
    winograd_transform,
)
from modicum.quant.native import NativeConv, NativeKernels
from modicum.quant.schemes import Scheme
from modicum.quant.transform import TILES

_DOCS = Path(__file__).resolve().parent.parent / "docs"
CHANNELS, LENGTH, TAPS = (64, 128, 256, 512), 400, 3
NOISE_CHANNELS, NOISE_FILTERS, SEEDS = 128, 64, 5
SHAPES = tuple(
    Conv1dShape(*sizes)
    for sizes in (
        (8, 8, LENGTH),
        (32, 32, LENGTH),
        *((c, c, LENGTH) for c in CHANNELS),
        (80, 64, LENGTH),
        (40, 100, 3000),
        (128, 128, 25),
        (256, 256, 2),
    )
)
"""For the oracle: narrow and short layers, too."""
ALPHAS = (1.0, 1.5, 2.0, 3.0)
Run = Callable[[], object]


# -- noise ---------------------------------------------------------------------------------------------------


def laplace(generator: torch.Generator, *shape: int) -> Tensor:
    """Laplace noise of scale 1."""
    u = torch.rand(*shape, generator=generator) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def half_normal(generator: torch.Generator, *shape: int) -> Tensor:
    """What a ReLU leaves of normal noise, zeros left out."""
    return torch.randn(*shape, generator=generator).abs()


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """From 0 to 1."""
    return torch.rand(*shape, generator=generator)


ACTIVATIONS = {
    "half-Laplace": lambda generator, *shape: laplace(generator, *shape).abs(),
    "half-normal": half_normal,
    "uniform": uniform,
}


def noise(scheme: Scheme, taps: int, activations: str, seed: int, search: bool = False) -> dict[str, float]:
    """SQNR of one layer in dB, with the range at the largest activation; saturation rate; α."""
    generator = torch.Generator().manual_seed(seed)
    x = ACTIVATIONS[activations](generator, 1, NOISE_CHANNELS, LENGTH)
    conv = nn.Conv1d(NOISE_CHANNELS, NOISE_FILTERS, taps, padding=taps // 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(laplace(generator, *conv.weight.shape))
    layer = QuantConv1d.of(conv, scheme, RangeSettings(input="max"))
    calibrate(layer, [x])
    if search:
        search_alphas(layer, [x])
    with torch.no_grad(), counting(layer):
        found = sqnr(layer.eval()(x), layer.double().float_output(x.double()))
    alpha = layer.scheme.alpha if isinstance(layer.scheme, RSQWinograd) else 1.0
    return {"sqnr": found, "saturation": layer.saturation_rate, "alpha": alpha}


def noise_of_schemes(seeds: int) -> dict[str, dict[str, list[dict[str, float]] | None]]:
    """By row and tile; None where the scheme does not take it."""
    rows: dict[str, tuple[Callable[[int, int], Scheme], bool]] = {
        "direct int8": (lambda m, r: DirectInt8(), False),
        "a. exact, 8-bit weights": (partial(ExactWinograd, 127), False),
        "a. exact, 6-bit weights": (partial(ExactWinograd, 31), False),
        "b. Winograd domain, one scale": (partial(TapwiseWinograd, 127, is_per_tap=False), False),
        "b. Winograd domain, per tap and channel": (partial(TapwiseWinograd, 127), False),
        "c. limited range": (partial(RangeLimitedWinograd, 127), False),
        **{f"d. RSQ, α = {alpha:g}": (partial(RSQWinograd, 127, alpha=alpha), False) for alpha in ALPHAS[1:]},
        "d. RSQ, α searched": (partial(RSQWinograd, 127), True),
    }
    found: dict[str, dict[str, list[dict[str, float]] | None]] = {}
    for name, (make, search) in rows.items():
        found[name] = {}
        for tile in TILES:
            try:
                found[name][str(winograd_transform(*tile))] = [
                    noise(make(*tile), tile[1], "half-Laplace", seed, search) for seed in range(seeds)
                ]
            except InputError:
                found[name][str(winograd_transform(*tile))] = None
        print(name, file=sys.stderr, flush=True)
    return found


def noise_of_alphas(seeds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """F(2, 3): by activations and α."""
    return {
        activations: {
            **{
                f"α = {alpha:g}": [
                    noise(RSQWinograd(alpha=alpha), 3, activations, seed) for seed in range(seeds)
                ]
                for alpha in ALPHAS
            },
            "searched": [noise(RSQWinograd(), 3, activations, seed, True) for seed in range(seeds)],
            "direct int8": [noise(DirectInt8(), 3, activations, seed) for seed in range(seeds)],
        }
        for activations in ACTIVATIONS
    }


# -- time ----------------------------------------------------------------------------------------------------


class Subject:
    """Layers of one size, and what runs them."""

    def __init__(self, channels: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, channels, LENGTH, generator=generator)
        self.conv = nn.Conv1d(channels, channels, TAPS, padding=1)
        self.settings = ConvSettings.of(self.conv)
        self.layers = {}
        for name, scheme in (("direct", DirectInt8()), ("winograd", RSQWinograd(alpha=2.0))):
            layer = QuantConv1d.of(self.conv, scheme, RangeSettings(input="max"))
            calibrate(layer, [self.x])
            self.layers[name] = layer.convert()

    def kernel(self, kind: str, kernels: NativeKernels) -> Run:
        """From int8 rows [T, C] to float32 rows [T, K]."""
        layer = self.layers[kind]
        limit = layer.scheme.input_limit
        native = NativeConv(layer.weights, self.settings, kind, limit, kernels)  # type: ignore[arg-type]
        rows = kernels.quantize(self.x[0], float(layer.input_scale.reciprocal()), limit)
        out = torch.empty((LENGTH, native.filters))
        scale = layer.scheme.output_scale(layer.input_scale, layer.weight_scale).flatten().contiguous()
        bias = layer.bias
        return lambda: native.of_rows(rows, out, scale, bias)

    def layer(self, kind: str) -> Run:
        """From float32 to float32."""
        layer: IntegerConv1d = self.layers[kind]
        return lambda: layer(self.x)


def time_of(channels: int, kernels: NativeKernels, timing: TimingSettings) -> dict[str, list[float]]:
    """Seconds of a call, sample by sample."""
    subject = Subject(channels)
    weight, x = subject.conv.weight.detach(), subject.x
    runs: dict[str, Run] = {"torch fp32": lambda: subject.conv(x)}
    runs |= peers.onnxruntime_runs(x, weight) | peers.torch_runs(x, weight)
    for variant in kernels.variants():
        if variant.name != "portable":
            for kind in ("direct", "winograd"):
                runs[f"{kind} {variant.name}"] = subject.kernel(kind, variant)
    runs |= {f"{kind} layer": subject.layer(kind) for kind in ("direct", "winograd")}
    with torch.no_grad():
        return interleaved(runs, timing, time.thread_time)


BEST = "best direct"


def ratios(samples: dict[str, list[float]], best: str) -> dict[str, Spread]:
    """Of the fused kernel's time to others', round by round: above 1 the fused kernel is faster."""
    fused = samples[f"winograd {best}"]
    direct = min(
        (name for name in samples if is_direct(name)), key=lambda name: statistics.median(samples[name])
    )
    others = {f"direct {best}": samples[f"direct {best}"], f"{BEST}: {direct}": samples[direct]}
    others["torch fp32"] = samples["torch fp32"]
    found = {
        name: Spread.of([x / y for x, y in zip(other, fused, strict=True)]) for name, other in others.items()
    }
    pairs = zip(samples["torch fp32"], samples["winograd layer"], strict=True)
    found["layer: torch fp32"] = Spread.of([x / y for x, y in pairs])
    pairs = zip(samples["direct layer"], samples["winograd layer"], strict=True)
    found["layer: direct"] = Spread.of([x / y for x, y in pairs])
    return found


def is_direct(name: str) -> bool:
    """Whether it is a direct int8 convolution, of anyone, that ends with whole numbers or floats of its
    own."""
    return "fp32" not in name and "winograd" not in name and "layer" not in name


# -- tables --------------------------------------------------------------------------------------------------


def section(raw: dict[str, Any]) -> str:
    """All tables."""
    return "\n\n".join([_head(raw), _noise(raw), _alphas(raw), _times(raw), _ratios(raw), _choices(raw)])


def _head(raw: dict[str, Any]) -> str:
    m = raw["machine"]
    return (
        f"Measured {raw['date']} in {raw['minutes']} minutes on one thread of a machine that other jobs "
        f"shared ({m['processor']}, {m['cores']} cores; torch {m['torch']}, onnxruntime "
        f"{raw['onnxruntime']}; kernels for {raw['kernels']}). All candidates of a size run in turn, "
        f"{raw['rounds']} rounds; times are medians of the thread's processor time (what other jobs take "
        "from it does not count), ratios are taken round by round."
    )


def _db(runs: list[dict[str, float]] | None) -> str:
    if runs is None:
        return "–"
    values = [run["sqnr"] for run in runs]
    middle, spread = statistics.median(values), max(values) - min(values)
    return f"{middle:.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if spread >= 1 else "")


def _noise(raw: dict[str, Any]) -> str:
    tiles = [str(winograd_transform(*tile)) for tile in TILES]
    rows = [[name, *(_db(row[tile]) for tile in tiles)] for name, row in raw["noise"].items()]
    return (
        f"**Signal-to-quantisation-noise ratio of one layer, dB.** C = {NOISE_CHANNELS}, K = "
        f"{NOISE_FILTERS}, T = {LENGTH}, Laplace weights, half-Laplace activations, ranges at the largest "
        f"value; median of {raw['seeds']} seeds, and their range where it is at least 1 dB. –: past 16 or "
        "32 bits.\n\n" + report.table(["", *tiles], rows)
    )


def _alphas(raw: dict[str, Any]) -> str:
    names = list(next(iter(raw["alphas"].values())))
    rows = []
    for activations, row in raw["alphas"].items():
        cells = []
        for name in names:
            rate = statistics.median(run["saturation"] for run in row[name])
            alpha = statistics.median(run["alpha"] for run in row[name])
            note = f", α {alpha:.2f}" if name == "searched" else ""
            cells.append(_db(row[name]) + (f", {rate:.1e} clipped" if rate else "") + note)
        rows.append([activations, *cells])
    return (
        "**α of F(2,3) and the distribution of activations.** dB as above, and the median share of "
        "transformed inputs that were clipped to int8.\n\n" + report.table(["activations", *names], rows)
    )


def _times(raw: dict[str, Any]) -> str:
    names = list(next(iter(raw["times"].values())))
    rows = [
        [name, *(f"{statistics.median(raw['times'][str(c)][name]) * 1e6:,.0f}" for c in CHANNELS)]
        for name in names
    ]
    return (
        f"**Microseconds of one convolution**, r = {TAPS}, T = {LENGTH}, C = K. `direct` and `winograd` with "
        "an instruction set are the kernels alone, from int8 rows to scaled float32 rows; `layer` is from "
        "float32 to float32, quantisation and transposition included. onnxruntime's QLinearConv and torch's "
        "quantised Conv1d give 8-bit outputs, ConvInteger int32; `_int_mm` is the product alone, with inputs "
        "that are unfolded beforehand.\n\n" + report.table(["", *(f"C = {c}" for c in CHANNELS)], rows)
    )


def _ratios(raw: dict[str, Any]) -> str:
    rows = []
    for c in CHANNELS:
        found = raw["ratios"][str(c)]
        (best,) = [name for name in found if name.startswith(BEST)]
        names = [f"direct {raw['kernels']}", best, "torch fp32", "layer: direct", "layer: torch fp32"]
        cells = [f"{found[n]['median']:.2f} ({found[n]['low']:.2f} to {found[n]['high']:.2f})" for n in names]
        cells[1] += f", {best.removeprefix(BEST + ': ')}"
        rows.append([str(c), *cells])
    head = ["C = K", "our direct", "the fastest direct of all", "torch fp32", "layer to direct layer"]
    return "**How many times faster fused F(2,3) is**, median and quartiles over rounds.\n\n" + report.table(
        [*head, "layer to torch fp32"], rows
    )


def _choices(raw: dict[str, Any]) -> str:
    rows = []
    for shape in raw["choices"]:
        median, low, high = (1 / shape["ratio"][key] for key in ("median", "high", "low"))
        size = [str(shape[key]) for key in ("channels", "filters", "length")]
        rows.append([*size, shape["chosen"], f"{median:.2f} ({low:.2f} to {high:.2f})"])
    return (
        "**What the latency oracle chooses**, from float32 to float32, and how many times faster F(2,3) "
        "was.\n\n" + report.table(["C", "K", "T", "chosen", "F(2,3) to direct"], rows)
    )


def main() -> None:
    """Measure, write, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, one seed; writes nothing")
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # torch's quantised tensors are deprecated
    kernels = native_kernels()
    if kernels is None:
        raise SystemExit("the kernels are not built: install a C++ compiler and ninja")
    started = datetime.now().astimezone()
    timing = TimingSettings(rounds=5 if asked.quick else 41, sample_seconds=0.004)
    seeds = 1 if asked.quick else SEEDS
    raw: dict[str, Any] = {
        "kernels": kernels.name,
        "rounds": timing.rounds,
        "seeds": seeds,
        "onnxruntime": peers.version(),
        "noise": noise_of_schemes(seeds),
        "alphas": noise_of_alphas(seeds),
        "times": {},
        "ratios": {},
        "choices": [],
    }
    oracle = conv1d_oracle()
    # Measured now, whatever the user's folder holds.
    folder = tempfile.TemporaryDirectory(prefix="modicum-latency-")
    fresh = LatencyOracle(oracle.operation, Path(folder.name), timing)
    for channels in CHANNELS:
        samples = time_of(channels, kernels, timing)
        raw["times"][str(channels)] = samples
        raw["ratios"][str(channels)] = {k: asdict(v) for k, v in ratios(samples, kernels.name).items()}
        print(channels, raw["ratios"][str(channels)], file=sys.stderr, flush=True)
    for shape in SHAPES:
        ratio = fresh.measure(shape)["winograd"].ratio
        raw["choices"].append(asdict(shape) | {"chosen": fresh.choose(shape), "ratio": asdict(ratio)})
    raw |= machine.since(started)
    print(section(raw))
    if not asked.quick:
        text = json.dumps(raw, indent=1) + "\n"
        (_DOCS / "benchmarks_winograd.json").write_text(text, encoding="utf-8")
        write_section(_DOCS / "winograd.md", "winograd", section(raw))


if __name__ == "__main__":
    main()
