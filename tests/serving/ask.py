"""Asks a vLLM engine in this process and prints what came, as JSON. Run in an environment that has vLLM.

python tests/serving/ask.py JOB.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    "HF_HUB_OFFLINE": "1",
}


def engine(job: dict[str, Any]) -> Any:
    """The engine of a job: model, modicum's settings or None, and vLLM's own arguments."""
    from vllm import LLM

    given = {
        "dtype": "float32",
        "max_num_batched_tokens": 64 + 8,
        "max_num_seqs": 8,
        "async_scheduling": False,
        "block_size": 32,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        **job.get("engine", {}),
    }
    if job.get("modicum") is not None:
        given["additional_config"] = {"modicum": {"chunk": 64, **job["modicum"]}}
        given["scheduler_cls"] = "modicum.vllm.scheduler.ArenaScheduler"
    return LLM(model=job["model"], **given)


class Watch:
    """Looks at the pages after every step, and at what each arena holds."""

    def __init__(self, llm: Any) -> None:
        self.core = llm.llm_engine.engine_core.engine_core
        scheduler = self.core.scheduler
        [self.manager] = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = scheduler.kv_cache_manager.block_pool
        self.most = 0
        self.preempted: list[tuple[int, int]] = []
        """The lengths of the prompt and of the answer so far of every request that had to wait again."""
        self.together = 0
        step = self.core.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = step(*args, **kwargs)
            pages = [len(blocks) for blocks in self.manager.req_to_blocks.values()]
            self.most = max(self.most, *pages, 0)
            self.together = max(self.together, len(scheduler.running))
            return out

        self.core.step_fn = watched if getattr(self.core, "step_fn", None) else None
        self.core.step = watched
        preempt = scheduler._preempt_request

        def preempted(request: Any, *args: Any, **kwargs: Any) -> Any:
            self.preempted.append((request.num_prompt_tokens, request.num_output_tokens))
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = preempted
        self.last: dict[int, tuple[Any, Any]] = {}
        self._watch_ledger()

    @property
    def free(self) -> int:
        return int(self.pool.get_num_free_blocks())

    def concurrency(self) -> float:
        """vLLM's own figure, which it prints at the start."""
        from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

        return float(
            get_max_concurrency_for_kv_cache_config(
                self.core.vllm_config, self.core.scheduler.kv_cache_config
            )
        )

    def eviction(self) -> Any:
        """The worker's."""
        runner = self.core.model_executor.driver_worker.worker.model_runner
        [[group]] = runner.attn_groups
        return group.get_metadata_builder().eviction

    def _watch_ledger(self) -> None:
        """Note each request's pages and length, by its first page, whenever a step begins."""
        from modicum.vllm.step import Ledger

        true = Ledger.step

        def step(ledger: Any, *args: Any) -> Any:
            made = true(ledger, *args)
            for row in range(len(made.new)):
                first = int(made.table[row, 0])
                self.last[first] = (made.table[row].clone(), int(made.after[row]))
            return made

        Ledger.step = step  # type: ignore[method-assign]

    def kept(self) -> list[list[list[int]]]:
        """[layers][heads]: the positions that the last request to have begun holds, in order."""
        table, after = list(self.last.values())[-1]
        found = []
        for positions in self.eviction().notes.positions:
            pages = table[: -(-after // positions.shape[2])].long()
            held = positions[pages].transpose(0, 1).flatten(1)[:, :after]
            found.append(held.sort(-1).values.tolist())
        return found


def _begin_and_abort(engine: Any, ids: list[int]) -> None:
    """Have a prompt read in part."""
    from vllm import SamplingParams

    engine.add_request("left", {"prompt_token_ids": ids}, SamplingParams(max_tokens=4, detokenize=False))
    for _ in range(3):
        assert not engine.step()
    engine.abort_request(["left"])
    while engine.has_unfinished_requests():
        engine.step()


def main() -> None:
    """Run a job: batches of prompts, one after the other."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import SamplingParams

    llm = engine(job)
    watch = Watch(llm) if job.get("modicum") is not None and job.get("watch", True) else None
    answer: dict[str, Any] = {"tokens": [], "free": [], "most": [], "kept": [], "together": []}
    if watch is not None:
        answer["free"].append(watch.free)
        answer["concurrency"] = watch.concurrency()
    for ids in job.get("abort", []):
        _begin_and_abort(llm.llm_engine, ids)
        answer["free"].append(watch.free if watch is not None else -1)
    for batch in job["batches"]:
        params = SamplingParams(
            temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in batch]
        outs = llm.generate(prompts, params, use_tqdm=False)
        answer["tokens"].append([list(o.outputs[0].token_ids) for o in outs])
        if watch is not None:
            answer["free"].append(watch.free)
            answer["most"].append(watch.most)
            answer["together"].append(watch.together)
            answer["kept"].append(watch.kept())
            answer["preempted"] = watch.preempted
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
