"""Loads a causal LM and its tokenizer: by a known name, from a folder or a GGUF file, or from the Hub."""

import difflib
import os
import re
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modicum import gguf_file, smollm2
from modicum.errors import ModelError
from modicum.gguf_file import GgufFile
from modicum.run_settings import RunSettings

_EMBEDDED = {"reference": "embedded/reference"}
_NAMES = (*_EMBEDDED, smollm2.NAME)
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Class names that end so have a language-model head, even where transformers' own table lists another class.
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Without any of these some transformers versions make up a tokenizer that knows no words, and say nothing.
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*", "tekken.json", "merges.txt")


def embedded() -> list[str]:
    """The names of the models that come with modicum."""
    return sorted(_EMBEDDED)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    weights: Literal["auto", "dense", "packed", "2:4"] = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for inference, and its tokenizer set up for left-padded batches.

    Args:
        name_or_path: an embedded name (see `embedded`); "smollm2", a real language model that a package of
            its own brings (see `modicum.smollm2`); a folder that transformers can read; a .gguf file, or a
            folder with one, of any architecture that transformers reads from GGUF; or a Hub name "org/name".
            A known name wins over a folder of that name; write "./smollm2" for the folder.
        dtype: of the weights: "float32", "float64", "bfloat16", "float16", a torch.dtype, or "auto" for
            what the model was saved in. The weights of a GGUF file are unpacked; "auto" is then what
            transformers chooses, float32 for most architectures.
        device: such as "cpu" or "cuda:1"; "auto" is "cuda" if there is one, else "cpu".
        weights: of a model that `prune` made smaller, "dense" unpacks them once, "packed" each time they
            are used; "auto" is what its folder says (`modicum fit` writes one that does), else "dense".
            "2:4" gives what was pruned so to a GPU's sparse products; where it has none, a warning tells that
            they are dense.

    Returns:
        The model, in eval mode on `device`, and the tokenizer. A tokenizer without a padding token pads
        with its end token (or its unknown token), and every tokenizer pads on the left.

    Raises:
        ModelError: there is no such model, it is not a causal LM, its files are missing or broken, or the
            dtype or device cannot be had.
    """
    if weights not in ("auto", "dense", "packed", "2:4"):
        raise ModelError(f"weights {weights!r} is not known; use 'auto', 'dense', 'packed' or '2:4'.")
    wanted_dtype = _parse_dtype(dtype)
    wanted_device = _parse_device(device)
    source = find(os.fspath(name_or_path))
    own = RunSettings.read(source) if isinstance(source, Path) and source.is_dir() else None
    if own is not None and dtype == "auto":
        wanted_dtype = _parse_dtype(own.dtype)
    if weights == "auto":
        weights = "packed" if own is not None and own.weights == "packed" else "dense"
    file = GgufFile.open(source) if _is_gguf(source) else None
    config = _read_config(source, file)
    _check_causal(source, config)
    tokenizer = _load_tokenizer(source, file)
    if isinstance(source, Path) and (source / "packed.safetensors").is_file():
        from modicum.weights.restore import restore

        model = restore(source, wanted_dtype, "packed" if weights == "packed" else "dense")
    elif weights == "packed":
        raise ModelError(
            f"{str(source)!r} is not packed: make it so with modicum prune, or use weights='dense'."
        )
    else:
        model = _load_model(source, wanted_dtype, config)
    _move(model, wanted_device)
    if weights == "2:4":
        from modicum.weights.semi import convert

        convert(model)
    _set_padding(model, tokenizer)
    model.train(False)  # what eval() does, with types
    if own is not None and isinstance(source, Path):
        own.apply(model, source)
    return model, tokenizer


def _inside(relative: str) -> Path:
    return Path(str(resources.files("modicum").joinpath(relative)))


def _parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto":
        return "auto"
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ModelError(f"dtype {dtype!r} is not one for weights; use 'auto', {_listed(_DTYPES)}.")
    return found


def _parse_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        torch.empty(1, device=parsed)
    # torch says "no such device" by whatever exception the backend has: RuntimeError, AssertionError, ...
    except Exception as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used: {_brief(error)}; use 'auto', 'cpu' or another device "
            "that torch sees here."
        ) from error
    return parsed


def find(name: str) -> str | Path:
    """The folder or GGUF file that a name stands for, or the name itself where only the Hub can tell."""
    if not name.strip():
        raise ModelError(f"the model's name is empty; give a folder, 'org/name' or {_listed(_NAMES)}.")
    if name in _EMBEDDED:
        return _inside(_EMBEDDED[name])
    if name == smollm2.NAME:
        return smollm2.folder()
    path = Path(name).expanduser()
    if path.is_dir():
        if not _has_weights(path) and (file := gguf_file.in_folder(path)) is not None:
            return file
        _check_folder(path)
        return path
    if path.suffix == gguf_file.SUFFIX and path.is_file():
        return path
    if path.exists():
        raise ModelError(
            f"{name!r} is a file; give the folder that holds config.json and the weights, or a .gguf file."
        )
    if _HUB_NAME.fullmatch(name):
        return name
    if "/" in name or os.sep in name:
        raise ModelError(f"there is no folder {name!r}; give the path of a folder that holds config.json.")
    raise ModelError(f"there is no model {name!r}; {_suggestion(name)}.")


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), _NAMES, n=1)
    if close:
        return f"did you mean {close[0]!r}? Otherwise give a folder, or 'org/name' for the Hub"
    return f"the names are {_listed(_NAMES)}; otherwise give a folder, or 'org/name' for the Hub"


def _has_weights(path: Path) -> bool:
    """Whether a folder holds a model as transformers saves it, which goes before a GGUF file beside it."""
    return (path / "config.json").is_file() and any(
        any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")
    )


def _check_folder(path: Path) -> None:
    if not any(path.iterdir()):
        raise ModelError(f"the folder {str(path)!r} is empty; it should hold config.json and the weights.")
    if not (path / "config.json").is_file():
        raise ModelError(
            f"the folder {str(path)!r} has no config.json; give a folder as transformers' "
            "save_pretrained writes it."
        )
    if not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(
            f"the folder {str(path)!r} has no tokenizer; put tokenizer.json (or the model's own tokenizer "
            "files) beside config.json, as tokenizer.save_pretrained does."
        )


def _read_config(source: str | Path, file: GgufFile | None) -> Any:
    try:
        return AutoConfig.from_pretrained(_place(source), **_options(source))
    # transformers lets anything out here, from OSError to TypeError; all of it means the same to a user.
    except Exception as error:
        if file is not None:
            raise ModelError(
                f"transformers {transformers.__version__} cannot read the model in {str(source)!r}, a GGUF "
                f"file of architecture {file.architecture!r}: {_brief(error)}; give the model as safetensors."
            ) from error
        raise ModelError(f"{_cannot_read(source, 'the config of')}: {_brief(error)}.") from error


def _check_causal(source: str | Path, config: Any) -> None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{str(source)!r} is an encoder-decoder ({kind}); modicum needs a decoder-only causal LM."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{str(source)!r} is a {kind} model, for which transformers has no causal LM; give a causal LM."
        )
    saved = list(getattr(config, "architectures", None) or [])
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if saved and not any(name in known or name.endswith(_CAUSAL_ENDINGS) for name in saved):
        raise ModelError(
            f"{str(source)!r} was saved as {', '.join(saved)}, which predicts no next token; give a "
            "checkpoint saved as a causal LM (such as LlamaForCausalLM)."
        )


def _load_tokenizer(source: str | Path, file: GgufFile | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_place(source), **_options(source))
    except Exception as error:  # as above
        remedy = "save it again with tokenizer.save_pretrained" if file is None else "give it as safetensors"
        raise ModelError(f"{_cannot_read(source, 'the tokenizer of')}: {_brief(error)}; {remedy}.") from error
    # Releases of transformers before 5.24 mix some of them up.
    for name, token in ({} if file is None else file.special_tokens()).items():
        setattr(tokenizer, name, token)
    return tokenizer


def _load_model(source: str | Path, dtype: str | torch.dtype, config: Any) -> PreTrainedModel:
    more = gguf_file.load_options(config) if _is_gguf(source) else {}
    bars = gguf_file.bars_that_can_be_silenced() if _is_gguf(source) else nullcontext()
    try:
        # transformers does not say in its types that this is a pair when the loading info is asked for.
        with bars:
            pair: Any = AutoModelForCausalLM.from_pretrained(
                _place(source), dtype=dtype, output_loading_info=True, **_options(source), **more
            )
    except Exception as error:  # as above
        raise ModelError(
            f"{_cannot_read(source, 'the weights of')}: {_brief(error)}"
            "; download or save all their files again."
        ) from error
    model: PreTrainedModel = pair[0]
    missing = sorted(pair[1]["missing_keys"])  # transformers fills them with random numbers and only warns
    if missing:
        raise ModelError(
            f"the weights of {str(source)!r} lack {len(missing)} tensors that its config calls for, such as "
            f"{missing[0]!r}; config.json and the weights should come from the same save."
        )
    return model


def _move(model: PreTrainedModel, device: torch.device) -> None:
    module: torch.nn.Module = model  # PreTrainedModel.to is decorated, and its types do not survive that
    try:
        module.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(weight.nbytes for weight in model.parameters()) / 2**20
        raise ModelError(
            f"the weights take {size:.0f} MiB, more than {str(device)!r} has free; use dtype='bfloat16', "
            "device='cpu' or a smaller model."
        ) from error


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.padding_side = "left"  # so that the last column is every row's newest token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    generation = model.generation_config
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id  # or generate() remarks on it at every call


def _is_gguf(source: str | Path) -> TypeGuard[Path]:
    """Of what `find` returns, a path is a folder or a GGUF file."""
    return isinstance(source, Path) and source.suffix == gguf_file.SUFFIX and source.is_file()


def _place(source: str | Path) -> str | Path:
    return source.parent if _is_gguf(source) else source


def _options(source: str | Path) -> dict[str, Any]:
    """A folder is never a reason to go to the network, and no model's own code is run (or asked about)."""
    file = {"gguf_file": source.name} if _is_gguf(source) else {}
    return {"local_files_only": isinstance(source, Path), "trust_remote_code": False, **file}


def _cannot_read(source: str | Path, part: str) -> str:
    if isinstance(source, Path):
        return f"{part} {str(source)!r} cannot be read"
    return f"there is no folder {source!r}, and {part} the Hub's model of that name cannot be had"


def _brief(error: Exception) -> str:
    """What an error says, in one line and not without end."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.rstrip(".")
    return text if len(text) <= 300 else text[:297] + "..."


def _listed(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + f" or {quoted[-1]}"
