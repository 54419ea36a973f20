"""How the embedded tokenizer was made: llama2.c's tok512.bin into a Hugging Face fast tokenizer.

    python tools/stories_tokenizer.py tests/data/tok512.bin src/modicum/embedded/stories

The file is llama2.c's binary vocabulary (karpathy/llama2.c, tokenizer.py): an int32 with the longest
token's length, then for each token a float32 score, an int32 length and its bytes.
"""

import json
import struct
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

SPECIAL = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2; llama2.c writes the last two with newlines around them
FIRST_PIECE = len(SPECIAL) + 256  # the byte tokens <0x00> to <0xFF> lie between
SPACE = "▁"  # SentencePiece's mark for a space; llama2.c's file has the space itself


def read_vocabulary(path: Path) -> list[tuple[str, float]]:
    data = path.read_bytes()
    tokens = []
    offset = 4
    while offset < len(data):
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        tokens.append((data[offset : offset + length].decode("utf-8"), score))
        offset += length
    return tokens


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best resulting score first.

    A score belongs to the result, not to the pair, so all pairs with the same result are equally good
    and llama2.c takes the leftmost of them. Ranks cannot tie, but that is only seen where two such pairs
    overlap in a text, which needs a piece that overlaps itself (such as "xyx"): refused below.
    """
    merges = []
    for whole in sorted(scores, key=lambda piece: -scores[piece]):
        splits = [(whole[:i], whole[i:]) for i in range(1, len(whole))]
        splits = [(left, right) for left, right in splits if left in scores and right in scores]
        if any(a[0] + a[1] == b[0] + b[1] and a[1] == b[0] and a != b for a in splits for b in splits):
            raise ValueError(f"the piece {whole!r} overlaps itself; the order of its merges would matter")
        merges += splits
    return merges


def build(tokens: list[tuple[str, float]]) -> Tokenizer:
    pieces = [(piece.replace(" ", SPACE), score) for piece, score in tokens[FIRST_PIECE:]]
    names = SPECIAL + [name for name, _ in tokens[len(SPECIAL) : FIRST_PIECE]] + [name for name, _ in pieces]
    vocabulary = {name: index for index, name in enumerate(names)}
    bpe = models.BPE(
        vocab=vocabulary,
        merges=merges_of(dict(pieces)),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)],
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s>:1 $B:1",
        special_tokens=[("<s>", vocabulary["<s>"])],
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    build(read_vocabulary(source)).save(str(folder / "tokenizer.json"))
    config = {
        # The plain class: transformers then takes tokenizer.json as it is, and rebuilds nothing of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # No model_max_length: longer prompts are what modicum is for, and a warning at each would be noise.
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
