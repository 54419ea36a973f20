"""How a call is cut into pieces, and which queries the ring remembers of them, against plain Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.kv.call import cuts, read_call
from modicum.kv.ring import QueryRing

CPU = torch.device("cpu")
MANY = settings(max_examples=150, derandomize=True, deadline=None, database=None)


@given(length=st.integers(1, 300), chunk=st.integers(1, 80))
@MANY
def test_a_call_is_cut_from_its_end(length: int, chunk: int) -> None:
    pieces = cuts(length, chunk)
    sizes = [b - a for a, b in pieces]
    assert [i for a, b in pieces for i in range(a, b)] == list(range(length))
    assert sizes[1:] == [chunk] * (len(sizes) - 1)
    assert 1 <= sizes[0] <= chunk
    # Columns before a call's tokens move no cut, counted from the end.
    longer = {length + 7 - a for a, _ in cuts(length + 7, chunk)}
    assert {length - a for a, _ in pieces[1:]} <= longer


@given(data=st.data())
@MANY
def test_tokens_are_counted_row_by_row_and_pads_never(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    before = tuple(data.draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows)))
    length, chunk, recent = (data.draw(st.integers(*limits)) for limits in ((1, 40), (1, 15), (0, 5)))
    past = data.draw(st.integers(0, 9))
    there = [[data.draw(st.integers(0, 3)) > 0 for _ in range(length)] for _ in range(rows)]
    if data.draw(st.booleans()):
        there = [[True] * length for _ in range(rows)]
    mask = torch.tensor([[False] * past + row for row in there]).to(
        data.draw(st.sampled_from([torch.int64, torch.bool]))
    )
    call = read_call(before, length, chunk, recent, mask, CPU)
    assert [(p.start, p.stop) for p in call.pieces] == cuts(length, chunk)
    count = list(before)
    for piece in call.pieces:
        positions = piece.positions.expand(rows, -1)
        for row in range(rows):
            for j, column in enumerate(range(piece.start, piece.stop)):
                real = there[row][column]
                assert int(positions[row, j]) == (count[row] if real else -1)
                assert piece.valid is None or bool(piece.valid[row, j]) == real
                count[row] += real
        assert piece.valid is not None or all(all(r[piece.start : piece.stop]) for r in there)
        assert piece.counts == tuple(sum(r[piece.start : piece.stop]) for r in there)
        assert piece.seen == tuple(count) == tuple(piece.seen_tensor.tolist())
        assert piece.limit.expand(rows, 1, 1).flatten().tolist() == [n - recent for n in count]
    assert call.after == tuple(count)
    assert call.counts == tuple(a - b for a, b in zip(count, before, strict=True))


@given(data=st.data())
@MANY
def test_the_ring_holds_the_last_queries_of_each_row(data: st.DataObject) -> None:
    rows, room = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    ring = QueryRing(rows, 2, 2, room, 4, torch.float32, CPU)
    where = ring.queries.data_ptr(), ring.positions.data_ptr()
    seen: tuple[int, ...] = (0,) * rows
    said: list[dict[int, torch.Tensor]] = [{} for _ in range(rows)]
    for _ in range(data.draw(st.integers(1, 8))):
        length = data.draw(st.integers(1, 9))
        mask = None
        if data.draw(st.booleans()):
            pads = data.draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
            mask = torch.arange(length) >= torch.tensor(pads)[:, None]
        call = read_call(seen, length, data.draw(st.integers(1, 9)), 0, mask, CPU)
        query = torch.randn(rows, 2, 2, length, 4)
        for piece in call.pieces:
            ring.write(query[:, :, :, piece.start : piece.stop], piece)
        for row in range(rows):
            real = range(length) if mask is None else mask[row].nonzero().flatten().tolist()
            for at, column in enumerate(real, start=seen[row]):
                said[row][at] = query[row, :, :, column]
        seen = call.after
        for row in range(rows):
            newest = range(max(0, seen[row] - room), seen[row])
            found = ring.positions[row].tolist()
            assert sorted(p for p in found if p >= 0) == list(newest)
            for slot, at in enumerate(found):
                if at >= 0:
                    assert torch.equal(ring.queries[row, :, :, slot], said[row][at])
    assert (ring.queries.data_ptr(), ring.positions.data_ptr()) == where
    rows_wanted = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
    queries, positions = ring.queries.clone(), ring.positions.clone()
    ring.select_rows(torch.tensor(rows_wanted))
    assert torch.equal(ring.queries, queries[rows_wanted])
    assert torch.equal(ring.positions, positions[rows_wanted])
    assert ring.nbytes == ring.queries.nbytes + ring.positions.nbytes
