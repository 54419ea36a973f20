"""Spaces: shapes that line up, names, assembled networks."""

from __future__ import annotations

import pytest
import torch

from modicum.errors import InputError, ModelError
from modicum.search.network import fingerprint
from modicum.search.space import ReferenceBlock, SearchSpace
from tests.search.networks import CHANNELS, Conv, inputs, network


def test_the_reference_of_its_own_blocks_is_itself() -> None:
    reference = network()
    space = SearchSpace(reference, inputs(1), [ReferenceBlock(), Conv()])
    same = space.assemble((0, 0), {})
    with torch.no_grad():
        assert torch.equal(same(inputs()), reference(inputs()))
    assert fingerprint(same) == fingerprint(reference)
    assert same.stem is not reference.stem
    assert space.sizes == (2, 2)
    assert space.num_networks == 4
    assert space.names((0, 1)) == ("reference", "k3-c4-s1")
    assert space.picks(space.names((1, 0))) == (1, 0)


def test_a_fingerprint_is_of_weights_and_buffers() -> None:
    reference = network()
    before = fingerprint(reference)
    reference.blocks[0][2].running_mean.add_(1e-3)
    assert fingerprint(reference) != before


def test_assembled_networks_have_the_given_weights() -> None:
    space = SearchSpace(network(), inputs(1), [Conv()])
    block = space.block(1, Conv())
    name = Conv().name
    found = space.assemble((0, 0), {(1, name): block.state_dict()})
    assert torch.equal(found.blocks[1][0].weight, block[0].weight)


def test_a_block_that_does_not_line_up_is_named_with_its_shapes() -> None:
    with pytest.raises(
        InputError, match=r"block 0 must turn \[4, 6, 6\] into \[4, 6, 6\].*'k3-c5-s1' gives \[5, 6, 6\]"
    ):
        SearchSpace(network(), inputs(1), [Conv(channels=CHANNELS + 1)])
    with pytest.raises(InputError, match=r"block 1 must turn.*'k9-c4-s1'"):
        SearchSpace(network(), inputs(1), [[Conv()], [_Unpadded(9)]])


class _Unpadded(Conv):
    """A kernel that is larger than its input."""

    def build(self, site):  # type: ignore[no-untyped-def]
        return torch.nn.Conv2d(CHANNELS, CHANNELS, self.kernel)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="give each its own name"):
        SearchSpace(network(), inputs(1), [Conv(), Conv()])
    with pytest.raises(InputError, match="variants for 1 blocks, and the reference has 2"):
        SearchSpace(network(), inputs(1), [[Conv()]])
    with pytest.raises(ModelError, match=r"does not take an input of the shape \(1, 5\)"):
        SearchSpace(network(), torch.zeros(1, 5), [Conv()])
    with pytest.raises(InputError, match="block 1 has no variant 'other'"):
        SearchSpace(network(), inputs(1), [Conv()]).picks([Conv().name, "other"])
