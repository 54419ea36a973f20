"""Trains the reference model: `python -m modicum.reference.train --data FOLDER --out DIR`.

The run can be stopped at any moment (Ctrl-C saves first) and goes on from its last checkpoint when started
again with the same folder. `export` writes what `modicum.load` reads.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as functional
import typer
from tokenizers import Tokenizer
from torch import Tensor

from modicum.errors import InputError
from modicum.reference.corpus import read_texts, sentences
from modicum.reference.crew import Crew, together
from modicum.reference.documents import Writer
from modicum.reference.guide import looks, sources
from modicum.reference.muon import Muon
from modicum.reference.recipe import Recipe, Stage
from modicum.reference.start import prepare
from modicum.reference.tokenizer import train_tokenizer, wrap
from modicum.tasks.words import listed
from modicum.whole_file import whole_file

_LATEST = "checkpoint.pt"
_WINDOW = 40  # steps over which a stage's answers are judged


def build(recipe: Recipe) -> Any:
    """The untrained model, a transformers LlamaForCausalLM in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_config: Any = LlamaConfig
    torch.manual_seed(recipe.seed)
    config = make_config(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.positions,
        rope_theta=recipe.rope_theta,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    make_model: Any = LlamaForCausalLM
    model = make_model(config)
    prepare(model, recipe)
    return model


def hidden_states(
    model: Any, ids: Tensor, positions: Tensor, guided: tuple[tuple[int, int], ...] = ()
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The last hidden states, [B, N, hidden], for positions with gaps, which the model itself would take for
    several sequences packed into one; and queries and keys, [B, H, N, head_dim], of the H guided heads."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inner = model.model
    hidden = inner.embed_tokens(ids)
    turns = inner.rotary_emb(hidden, positions)
    found: list[tuple[Tensor, Tensor]] = []
    for number, layer in enumerate(inner.layers):
        heads = [head for at, head in guided if at == number]
        if heads:
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            query, key = (
                projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, *turns)
            found.append((query[:, heads], key[:, [h // attention.num_key_value_groups for h in heads]]))
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns)
    last: Tensor = inner.norm(hidden)
    if not found:
        return last, None
    queries, keys = zip(*found, strict=True)
    return last, (torch.cat(queries, 1), torch.cat(keys, 1))


def optimisers(model: Any, recipe: Recipe, crew: Crew | None = None) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    embeddings = model.model.embed_tokens.weight
    known = {id(embeddings), *map(id, matrices)}
    others = [
        {"params": [embeddings], "share": recipe.embedding_rate / recipe.vector_rate},
        {"params": [p for p in model.parameters() if id(p) not in known], "share": 1.0},
    ]
    return (
        Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, crew=crew),
        torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.98), weight_decay=0.0),
    )


def spread_positions(count: int, length: int, recipe: Recipe, rng: random.Random) -> Tensor:
    """Positions for `count` sequences, [count, length], some with a gap or two."""
    rows = []
    for _ in range(count):
        row = torch.arange(length)
        spare = recipe.positions - length
        if spare > 0 and rng.random() < recipe.gaps:
            for _ in range(rng.randint(1, 2)):
                gap = int(math.exp(rng.uniform(0, math.log(spare + 1)))) // 2
                row[rng.randrange(1, length) :] += gap
        rows.append(row)
    return torch.stack(rows)


class Training:
    """One run: its model, optimisers, place in the curriculum and folder.

    Args:
        recipe: what is trained and how.
        data: folders of texts.
        out: where checkpoints and the log go; a run that is there goes on.
        crew: the workers that share each step; alone if nothing is said.
        start: an exported model whose weights and tokenizer a new run starts from.
        stage: where in the curriculum a new run begins.
        bfloat16: whether products are computed in bfloat16.

    Raises:
        InputError: the data hold no text, the run in `out` or the model in `start` has other sizes than the
            recipe, or there is no such stage.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: list[Path],
        out: Path,
        crew: Crew | None = None,
        *,
        start: Path | None = None,
        stage: int = 0,
        bfloat16: bool = False,
    ) -> None:
        if not 0 <= stage < len(recipe.stages):
            raise InputError(f"there is no stage {stage}: the recipe has 0 to {len(recipe.stages) - 1}")
        self.recipe = recipe
        self.crew = crew or Crew()
        self.out = out
        self.bfloat16 = bfloat16
        out.mkdir(parents=True, exist_ok=True)
        texts, self.held_back = read_texts(data, recipe.held_back)
        self.tokenizer = _tokenizer(out, texts, recipe, start)
        cut = [sentences(text) for text in texts.values()]
        ids = [[e.ids for e in self.tokenizer.encode_batch(s, add_special_tokens=False)] for s in cut if s]
        self.writer = Writer(self.tokenizer, ids)
        self.model = build(recipe)
        if start is not None:
            _load(self.model, start)
        self.muon, self.adam = optimisers(self.model, recipe, self.crew)
        self.step = 0
        self.tokens = sum(one.tokens for one in recipe.stages[:stage])
        self.stage = stage
        self.spent = 0  # tokens in this stage
        self.right: dict[str, deque[tuple[int, int]]] = _windows()
        self._resume()

    # ------------------------------------------------------------------ going

    def run(self, minutes: float | None = None) -> None:
        """Until the tokens are spent, the minutes are over, or Ctrl-C; saves at the end and every minute."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        # What ends the run must end it for all workers after the same step.
        last = None if minutes is None else time.monotonic() + 60 * minutes

        saved = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,} tokens"),
            TimeRemainingColumn(),
        )
        try:
            with Progress(*columns, disable=not self.crew.leads) as bar:
                task = bar.add_task("training", total=self.recipe.total_tokens, completed=self.tokens)
                while self.tokens < self.recipe.total_tokens:
                    line = self.advance()
                    bar.update(
                        task,
                        completed=self.tokens,
                        description=f"{line['length']} tokens, loss {line['loss']:.3f}",
                    )
                    now = time.monotonic()
                    if now - saved > 60:
                        self.save()
                        saved = now
                    if self.crew.any(last is not None and now > last):
                        break
        finally:
            self.save()

    def advance(self) -> dict[str, Any]:
        """One optimiser step and its line in the log."""
        began = time.monotonic()
        stage = self.recipe.stages[self.stage]
        rng = random.Random(f"{self.recipe.seed}/{self.step}")
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            found = self._gradients(stage, rng)
        losses, hits = self.crew.join(self.model, *found)
        rate = stage.rate * self._rate()
        for optimiser, base in ((self.muon, self.recipe.matrix_rate), (self.adam, self.recipe.vector_rate)):
            for group in optimiser.param_groups:
                group["lr"] = base * rate * group.get("share", 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        count = stage.batch // stage.length * stage.length
        self.tokens += count
        self.spent += count
        for kind, pair in hits.items():
            self.right[kind].append(pair)
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "length": stage.length,
            "loss": losses["all"],
            "text_loss": losses.get("text"),
            "guide_loss": losses.get("guide"),
            "right": {kind: round(_share(self.right[kind]), 4) for kind in sorted(self.right)},
            "rate": rate,
            "seconds": round(time.monotonic() - began, 3),
        }
        if self.crew.leads:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        self._promote(stage)
        return line

    def _gradients(
        self, stage: Stage, rng: random.Random
    ) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
        """Adds the gradients of one step; returns losses and, per kind, answers' tokens (right, all)."""
        kinds = rng.choices(list(stage.shares), list(stage.shares.values()), k=stage.batch // stage.length)
        drawn = [self.writer.draw(kind, stage.length, rng) for kind in kinds]
        luck_seed = rng.getrandbits(40)
        gaps = spread_positions(len(drawn), stage.length, self.recipe, rng)
        drawn, positions = self.crew.share(drawn), self.crew.share(gaps)
        ids = torch.tensor([one.ids for one in drawn])
        marks = torch.tensor([one.marks for one in drawn])[:, 1:]
        guided = self.recipe.guided if self.recipe.guide_weight else ()
        hidden, guide = hidden_states(self.model, ids[:, :-1], positions[:, :-1], guided)
        # Of the tokens that weigh little only a sample goes through the head, with the weight of all.
        luck = torch.rand(marks.shape, generator=torch.Generator().manual_seed(luck_seed))
        keep = (marks > 0) | ((marks == -1) & (luck < 0.5)) | ((marks == 0) & (luck < 0.1))
        marks_kept = marks[keep]
        weigh = {
            2: self.recipe.choice_weight,
            1: self.recipe.answer_weight,
            0: self.recipe.other_weight / 0.1,
            -1: self.recipe.text_weight / 0.5,
        }
        weights = torch.tensor([weigh[mark] for mark in marks_kept.tolist()])
        logits = self.model.lm_head(hidden[keep])
        targets = ids[:, 1:][keep]
        each = functional.cross_entropy(logits, targets, reduction="none")
        loss = (each * weights).sum() / weights.sum()
        losses = {"all": float(loss.detach())}
        if guide is not None:
            told = [sources(one.ids, one.marks) for one in drawn]
            worth = [[1.0 if mark == 2 else 0.1 for mark in one.marks] for one in drawn]
            missed, all_told = looks(*guide, told, worth)
            if all_told:
                losses["guide"] = float(missed.detach()) / all_told
                loss = loss + self.recipe.guide_weight * missed / all_told
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            right = logits.argmax(-1) == targets
            rows = torch.arange(len(drawn))[:, None].expand_as(marks)[keep]
            # In copies every token counts; for the others what follows the choice says little.
            copies = torch.tensor([one.kind in ("copy", "exact") for one in drawn])[rows]
            answer = (marks_kept == 2) | (copies & (marks_kept == 1))
            hits: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
            good = torch.bincount(rows[answer & right], minlength=len(drawn)).tolist()
            all_ = torch.bincount(rows[answer], minlength=len(drawn)).tolist()
            for one, g, a in zip(drawn, good, all_, strict=True):
                if a:
                    hits[one.kind] = (hits[one.kind][0] + g, hits[one.kind][1] + a)
            if (marks_kept == -1).any():
                losses["text"] = float(each[marks_kept == -1].mean())
        return losses, dict(hits)

    def _rate(self) -> float:
        warm = min(1.0, (self.step + 1) / self.recipe.warmup)
        left = 1 - self.tokens / self.recipe.total_tokens
        return warm * min(1.0, 0.05 + 0.95 * left / self.recipe.cooldown)

    def _promote(self, stage: Stage) -> None:
        judged = [self.right[kind] for kind in stage.shares if kind not in ("text", "count")]
        full = all(len(window) >= _WINDOW // 2 for window in judged)
        passed = full and not stage.whole and sum(map(_share, judged)) / len(judged) >= self.recipe.pass_mark
        if (passed or self.spent >= stage.tokens) and self.stage + 1 < len(self.recipe.stages):
            self.stage += 1
            self.spent = 0
            self.right = _windows()

    # ---------------------------------------------------------------- keeping

    def save(self) -> None:
        """The checkpoint, whole or not at all."""
        if not self.crew.leads:
            return
        state = {
            "recipe": self.recipe.to_dict(),
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "place": (self.step, self.tokens, self.stage, self.spent),
            "right": {kind: list(window) for kind, window in self.right.items()},
        }
        path = self.out / _LATEST
        with whole_file(path) as part:
            torch.save(state, part)

    def _resume(self) -> None:
        path = self.out / _LATEST
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        shape = ("vocabulary", "hidden", "mlp", "layers", "heads", "kv_heads", "head_dim", "rope_theta")
        for name in shape:
            was, now = state["recipe"][name], getattr(self.recipe, name)
            if was != now:
                raise InputError(
                    f"{path} was trained with {name} {was}, not {now}: give another folder with --out"
                )
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.tokens, self.stage, self.spent = state["place"]
        for kind, window in state["right"].items():
            self.right[kind].extend(window)
        if self.crew.leads:
            _cut_log(self.out / "log.jsonl", self.step)

    def export(self, folder: Path, mean_with: Path | None = None) -> None:
        """Weights in bfloat16 and tokenizer, as transformers' from_pretrained reads them.

        mean_with: an earlier checkpoint of this run; the mean of both is written, which often does what
            either does best (Izmailov et al. 2018, "Averaging weights leads to wider optima", arXiv
            1803.05407).

        Raises:
            InputError: there is no such checkpoint.
        """
        copy = build(self.recipe)
        copy.load_state_dict(self.model.state_dict())
        if mean_with is not None:
            if not mean_with.is_file():
                raise InputError(f"there is no checkpoint {mean_with}: give one that was kept of this run")
            earlier = torch.load(mean_with, weights_only=True)["model"]
            copy.load_state_dict({k: (w + earlier[k]) / 2 for k, w in copy.state_dict().items()})
        copy.to(torch.bfloat16).save_pretrained(folder)
        wrap(self.tokenizer).save_pretrained(folder)
        # What `dtype="auto"` loads: many CPUs have no bfloat16 units and take ten times as long in it.
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _windows() -> dict[str, deque[tuple[int, int]]]:
    return defaultdict(lambda: deque(maxlen=_WINDOW))


def _share(window: deque[tuple[int, int]]) -> float:
    total = sum(a for _, a in window)
    return sum(g for g, _ in window) / total if total else 0.0


def _tokenizer(out: Path, texts: dict[str, str], recipe: Recipe, start: Path | None) -> Tokenizer:
    """That of the run in `out`; a new run takes the one of `start`, or learns its own."""
    path = out / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    if start is not None:
        tokenizer = Tokenizer.from_file(str(_exported(start, "tokenizer.json")))
    else:
        # The lists' words are no more frequent than a text's, but keys are made of them.
        words = [f" {a}-{n} {n}" for a, n in zip(listed("adjective") * 8, listed("noun"), strict=False)]
        tokenizer = train_tokenizer([*texts.values(), " ".join(words)], recipe.vocabulary)
    tokenizer.save(str(path))
    return tokenizer


def _exported(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InputError(f"there is no {path}: give a folder that --export wrote")
    return path


def _load(model: Any, folder: Path) -> None:
    from safetensors.torch import load_file

    path = _exported(folder, "model.safetensors")
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise InputError(f"{path} does not have the sizes of the recipe: {error}") from error


def _cut_log(path: Path, step: int) -> None:
    """Drops what was logged after the checkpoint."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def work(
    crew: Crew, recipe: Recipe, data: list[Path], out: Path, minutes: float | None, options: dict[str, Any]
) -> None:
    """What each worker does."""
    training = Training(recipe, data, out, crew, **options)
    with suppress(KeyboardInterrupt):
        training.run(minutes)


def main(
    data: Annotated[list[Path], typer.Option(help="A folder of .txt files; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Checkpoints and the log go here; an earlier run goes on.")],
    minutes: Annotated[float | None, typer.Option(help="Stop after so long.")] = None,
    total_tokens: Annotated[int | None, typer.Option(help="Length of the whole run.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write the model here at the end.")] = None,
    mean_with: Annotated[
        Path | None, typer.Option(help="Write the mean with the weights of this earlier checkpoint.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that share each step, one thread each.")] = 1,
    start: Annotated[Path | None, typer.Option(help="An exported model to start a new run from.")] = None,
    stage: Annotated[int, typer.Option(help="Where in the curriculum a new run begins, from 0.")] = 0,
    bfloat16: Annotated[bool, typer.Option(help="Products in bfloat16: for CPUs made for it.")] = False,
) -> None:
    """Train the reference model; start again with the same --out to go on."""
    recipe = Recipe()
    if total_tokens is not None:
        recipe = replace(recipe, total_tokens=total_tokens)
    out.mkdir(parents=True, exist_ok=True)
    options = {"start": start, "stage": stage, "bfloat16": bfloat16}
    if minutes != 0:
        together(workers, work, recipe, data, out, minutes, options)
    if export is not None:
        Training(recipe, data, out, start=start, stage=stage).export(export, mean_with)


if __name__ == "__main__":
    typer.run(main)
