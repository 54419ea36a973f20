"""The recipe of a model that is trained in a second."""

from modicum.reference.recipe import Recipe, Stage

LONG = {"copy": 1.0, "table": 1.0, "needle": 2.0, "chain": 1.0, "count": 0.5, "text": 1.0}
TINY = Recipe(
    vocabulary=512,
    hidden=32,
    mlp=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    positions=256,
    stages=(Stage(64, 256, {"copy": 1.0, "table": 1.0}, 1024), Stage(128, 256, LONG, 10_000)),
    guided=((1, 0), (1, 3)),
    warmup=2,
    total_tokens=4096,
    held_back=("held",),
)
