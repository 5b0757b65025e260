"""Which requests bring a block in from model files, against a byte-by-byte look; and which blocks a layout makes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.catalog import PAGE, Block, lay_out
from tierstore.errors import ModelFileError, OptionError, SizeError
from tierstore.nvme.adopted import GAP_BYTES, Adopted, ModelFile, gaps, pieces, ranges
from tierstore.nvme.layouts import by_layer, claims
from tierstore.nvme.model_files import FoundTensor, Model, natural

FILE_BYTES = 3 << 20


@st.composite
def scattered(draw: st.DrawFn) -> tuple[Block, Adopted]:
    """A block whose tensors lie anywhere in two files, without overlapping."""
    sizes = draw(st.lists(st.integers(0, 3 * PAGE) | st.integers(0, 300_000), min_size=1, max_size=8))
    generator = random.Random(draw(st.integers(0, 1 << 30)))
    places: list[tuple[int, int]] = []
    ends = [100, 9]
    for size in sizes:
        file = generator.randrange(2)
        begin = ends[file] + generator.choice([0, 0, 1, 77, 5000, GAP_BYTES + PAGE])
        places.append((file, begin))
        ends[file] = begin + size
    order = list(range(len(sizes)))
    generator.shuffle(order)
    block = lay_out("b", [(str(index), "U8", (sizes[index],)) for index in order])
    files = tuple(ModelFile(f"/{file}", max(ends[file], 1), 0, 0, 8) for file in range(2))
    return block, Adopted(files, tuple(places[index] for index in order))


def content(file: int, begin: int, nbytes: int) -> bytes:
    return bytes((place * 31 + place // 256 * 7 + 101 * file) % 251 for place in range(begin, begin + nbytes))


def payload_of(block: Block, adopted: Adopted) -> bytes:
    payload = bytearray(block.nbytes)
    for spec, (file, begin) in zip(block.tensors, adopted.places, strict=True):
        payload[spec.offset : spec.offset + spec.nbytes] = content(file, begin, spec.nbytes)
    return bytes(payload)


@given(case=scattered(), max_pages=st.integers(1, 64), data=st.data())
def test_pieces_bring_every_byte_to_its_place(case: tuple[Block, Adopted], max_pages: int, data: st.DataObject) -> None:
    block, adopted = case
    expected = payload_of(block, adopted)
    found = bytearray(b"\xff" * block.nbytes)
    for low, high in gaps(block):
        found[low:high] = bytes(high - low)
    reached: dict[int, int] = {}
    for piece in pieces(ranges(block, adopted), max_pages * PAGE):
        assert piece.begin % PAGE == piece.nbytes % PAGE == 0
        assert 0 < piece.nbytes <= max_pages * PAGE
        assert 0 < piece.needed <= piece.nbytes
        assert piece.begin >= reached.get(piece.file, 0), "a page is read twice"
        reached[piece.file] = piece.begin + piece.nbytes - PAGE  # two runs may share a page
        assert piece.begin + piece.needed <= adopted.files[piece.file].nbytes
        buffer = content(piece.file, piece.begin, piece.needed)
        for part in piece.parts:
            assert part.nbytes > 0
            source = part.begin - piece.begin
            assert 0 <= source <= source + part.nbytes <= piece.needed
            found[part.target : part.target + part.nbytes] = buffer[source : source + part.nbytes]
    assert bytes(found) == expected
    start = data.draw(st.integers(0, block.nbytes))
    stop = data.draw(st.integers(start, block.nbytes))
    part_of = bytearray(b"\xff" * (stop - start))
    for low, high in gaps(block, start, stop):
        part_of[low - start : high - start] = bytes(high - low)
    for one in ranges(block, adopted, start, stop):
        part_of[one.target - start : one.target - start + one.nbytes] = content(one.file, one.begin, one.nbytes)
    assert bytes(part_of) == expected[start:stop]


def test_requests_are_few_and_large() -> None:
    """What lies one behind the other in a file is one run, however many tensors it is; and two runs where too much lies between."""
    block = lay_out("b", [(str(index), "U8", (257,)) for index in range(4000)])
    file = ModelFile("/f", 1 << 30, 0, 0, 8)
    dense = Adopted((file,), tuple((0, 1000 + 257 * index) for index in range(4000)))
    assert len(pieces(ranges(block, dense), 16 << 20)) == 1
    assert len(pieces(ranges(block, dense), 256 << 10)) == 4  # 1,028,000 bytes
    apart = Adopted((file,), tuple((0, 1000 + 257 * index + (1 << 20) * (index >= 2000)) for index in range(4000)))
    assert len(pieces(ranges(block, apart), 16 << 20)) == 2
    aligned = lay_out("b", [(str(index), "U8", (1 << 20,)) for index in range(8)])
    in_order = Adopted((file,), tuple((0, 5 + (index << 20)) for index in range(8)))
    (only,) = ranges(aligned, in_order)
    assert only.nbytes == 8 << 20, "neighbours in file and payload are moved as one"


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("model.layers.10.mlp.experts.5.w1.weight", "model.layers.10"),
        ("encoder.block.0.layer.1.weight", "encoder.block.0"),
        ("0.weight", "0"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
        ("cls_token", "model"),
        ("queue.0", "queue"),
        ("a.²3.weight", "a.²3"),
        (".x", "model"),
    ],
)
def test_layers_are_found_by_running_numbers(name: str, block: str) -> None:
    assert by_layer(name) == block


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["l.10", "l.9", "a.2.b10", "a.2.b9", "a", "l.x", "l." + "9" * 5000, "l.²"]
    assert sorted(names, key=natural)[:5] == ["a", "a.2.b9", "a.2.b10", "l.9", "l.10"]
    assert sorted(["l.10", "l.9"], key=natural) == ["l.9", "l.10"]


def model(*names: str, nbytes: int = 4) -> Model:
    files = tuple(ModelFile(f"/model/{file}", 1 << 40, 0, 0, 8) for file in range(2))
    return Model("/model", files, tuple(FoundTensor(name, "U8", (nbytes,), index % 2, 100 * index) for index, name in enumerate(names)))


def test_blocks_come_by_first_file_and_then_by_name() -> None:
    found = claims(model("l.10.a", "z.a", "l.9.a", "l.10.b", "l.2.a"), "layers")
    assert [claim.block.name for claim in found] == ["l.2", "l.9", "l.10", "z"]
    (ten,) = [claim for claim in found if claim.block.name == "l.10"]
    assert [spec.name for spec in ten.block.tensors] == ["l.10.a", "l.10.b"]
    assert [file.path for file in ten.adopted.files] == ["/model/0", "/model/1"]
    assert ten.adopted.places == ((0, 0), (1, 300))


def test_a_function_groups_and_leaves_out() -> None:
    found = claims(model("a", "b", "c"), {"a": "one", "c": "one"}.get)
    assert [(claim.block.name, [spec.name for spec in claim.block.tensors]) for claim in found] == [("one", ["a", "c"])]
    assert [file.path for file in found[0].adopted.files] == ["/model/0"], "files that hold none of it are not its"


@pytest.mark.parametrize("layout", ["blocks", None, 3, b"layers"])
def test_a_layout_that_is_none(layout: object) -> None:
    with pytest.raises(OptionError, match="layout="):
        claims(model("a"), layout)  # type: ignore[arg-type]


def test_what_a_function_may_not_return() -> None:
    with pytest.raises(OptionError, match=r"'b'.*") as caught:
        claims(model("a", "b"), lambda name: 5 if name == "b" else "x")  # type: ignore[arg-type, return-value]
    assert (caught.value.tensor, caught.value.path) == ("b", "/model/1")
    with pytest.raises(OptionError, match="leaves nothing"):
        claims(model("a"), lambda name: None)
    with pytest.raises(ModelFileError, match="training state") as refused:
        claims(model("a", "b"), lambda name: f"optimizer/{name}" if name == "b" else "x")
    assert (refused.value.tensor, refused.value.path, refused.value.block) == ("b", "/model/1", "optimizer/b")
    for bad in ("", "\ud800"):
        with pytest.raises(ModelFileError, match="/model/0"):
            claims(model("a"), lambda name, bad=bad: bad)  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):
        claims(model("a"), lambda name: str(1 // 0))


def test_state_in_the_names_of_a_file_is_refused_too() -> None:
    with pytest.raises(ModelFileError, match="training state") as caught:
        claims(model("fine", "gradients/x.weight"), "layers")
    assert caught.value.tensor == "gradients/x.weight"


def test_too_large_for_a_header() -> None:
    huge = Model("/m", (ModelFile("/m", 1 << 50, 0, 0, 8),), (FoundTensor("a", "U8", (1,) * 65, 0, 8),))
    with pytest.raises(SizeError, match="/m"):
        claims(huge, "layers")
