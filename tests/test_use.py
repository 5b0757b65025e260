"""`use()`: what it yields, when a block is dirty, what a read lease allows, and names given in odd ways."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.quiet import assert_quiet, tensor_of
from tierstore import TierStore
from tierstore.errors import BlockNotFoundError, FrozenError, LeaseError, LeaseTimeoutError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TierStore]:
    with TierStore(gpu="256KiB", ram="1MiB", nvme=tmp_path / "swap", device="cpu") as store:
        store.put("lone", torch.arange(5.0))
        store.put("pair", {"weight": torch.ones(3, 4), "bias": torch.zeros(4, dtype=torch.float64)})
        store.put("frozen", torch.tensor([7]), frozen=True)
        yield store
        assert_quiet(store)


def test_one_block_yields_its_tensor_or_its_mapping(store: TierStore) -> None:
    with store.use("lone") as lone:
        assert isinstance(lone, torch.Tensor)
        assert torch.equal(lone, torch.arange(5.0))
    with store.use("pair") as pair:
        assert isinstance(pair, dict)
        assert list(pair) == ["weight", "bias"]
        assert pair["weight"].shape == (3, 4)
        assert pair["bias"].dtype == torch.float64
        assert all(tensor.data_ptr() % 256 == 0 for tensor in pair.values())


def test_several_blocks_yield_a_tuple_in_the_order_asked_for(store: TierStore) -> None:
    with store.use("pair", "lone", "frozen") as leased:
        assert isinstance(leased, tuple)
        pair, lone, frozen = leased
        assert set(pair) == {"weight", "bias"}
        assert lone.shape == (5,)
        assert frozen.tolist() == [7]


def test_a_name_given_twice_yields_the_same_bytes_twice_and_one_lease(store: TierStore) -> None:
    with store.use("lone", "lone", write=True) as (first, second):
        assert store.info("lone").leases == 1
        first[0] = 42
        assert second[0] == 42
    with store.use("lone", "pair", "lone", write="lone") as (first, _, second):
        assert first.data_ptr() == second.data_ptr()


def test_no_names_at_all_yield_an_empty_tuple(store: TierStore) -> None:
    with store.use() as nothing:
        assert nothing == ()
        with store.use() as still_nothing, store.use("lone", write=True):
            assert still_nothing == ()
    with store.use(write=True) as nothing:
        assert nothing == ()
        store.commit()  # no lease is out


def test_every_lease_hands_out_fresh_tensors(store: TierStore) -> None:
    with store.use("lone", write=True) as lone:
        lone.requires_grad_()
        (lone * 2).sum().backward()
        assert lone.grad is not None
    with store.use("lone") as lone:
        assert lone.grad is None
        assert not lone.requires_grad


def test_writing_one_block_leaves_what_autograd_saved_of_another(store: TierStore) -> None:
    """Blocks lie in one allocation, but share no version counter."""
    with store.use("lone", "pair", write="pair") as (lone, pair):
        x = torch.ones(5, requires_grad=True)
        product = (x * lone).sum()
        pair["weight"].add_(1)
        product.backward()
        assert x.grad is not None
        assert torch.equal(x.grad, torch.arange(5.0))


def test_what_may_be_written_is_dirty_at_exit(store: TierStore) -> None:
    store.commit()
    with store.use("lone", "pair", write="pair"):
        assert store.info("pair").write_leased
        assert not store.info("lone").write_leased
    assert store.info("pair").dirty
    assert not store.info("lone").dirty


@pytest.mark.parametrize("write", [True, "lone", ["lone"], {"lone"}, ("lone",)])
def test_what_was_written_stays_also_when_an_exception_leaves(store: TierStore, write: bool | str | list[str]) -> None:
    store.commit()
    with pytest.raises(ZeroDivisionError), store.use("lone", write=write) as lone:
        lone.fill_(3)
        raise ZeroDivisionError
    assert store.info("lone").dirty
    assert store.info("lone").leases == 0
    store.evict("lone")
    assert torch.equal(tensor_of(store, "lone"), torch.full((5,), 3.0))


def test_writing_under_a_read_lease_is_found_on_leaving(store: TierStore) -> None:
    with pytest.raises(LeaseError, match="'lone'") as caught, store.use("lone") as lone:
        lone.add_(1)
    assert caught.value.block == "lone"
    assert caught.value.remedy
    with pytest.raises(LeaseError, match="'pair'"), store.use("lone", "pair", write="lone") as (lone, pair):
        lone.add_(1)
        pair["bias"].add_(1)
    assert store.info("lone").leases == store.info("pair").leases == 0
    with store.use("lone", write=True) as lone, store.use("lone") as again:  # inside one's own write lease it is allowed
        again.add_(1)
        lone.add_(1)


def test_an_exception_of_the_caller_is_not_hidden_by_the_check(store: TierStore) -> None:
    with pytest.raises(ZeroDivisionError), store.use("lone") as lone:
        lone.add_(1)
        raise ZeroDivisionError


def test_reentrance(store: TierStore) -> None:
    with store.use("lone"), store.use("lone"), store.use("lone", "pair"):
        assert store.info("lone").leases == 3
    with store.use("lone", write=True) as outer, store.use("lone", write=True) as inner, store.use("lone") as innermost:
        outer[0] += 1
        inner[0] += 1
        assert innermost[0] == 2
    with store.use("lone"), pytest.raises(LeaseError, match="read lease"), store.use("lone", write=True):
        pass
    with store.use("lone"), pytest.raises(LeaseError), store.use("pair", "lone", write="lone"):
        pass
    assert store.info("pair").leases == 0


def test_inner_writes_count_once_the_inner_lease_ends(store: TierStore) -> None:
    store.commit()
    with store.use("pair", write=True):
        with store.use("pair", write=True) as pair:
            pair["bias"].fill_(9)
        assert store.info("pair").write_leased
        with pytest.raises(LeaseError):
            store.commit()
    assert store.info("pair").dirty


def test_a_context_is_entered_once(store: TierStore) -> None:
    lease = store.use("lone")
    with lease, pytest.raises(LeaseError, match="twice"), lease:
        pass
    assert store.info("lone").leases == 0
    assert_quiet(store)


def test_a_context_never_entered_takes_nothing(store: TierStore) -> None:
    store.use("lone", write=True)
    store.use("unknown")
    assert store.info("lone").leases == 0


def test_a_lease_that_was_dropped_ends_with_its_last_reference(store: TierStore) -> None:
    def leaking() -> Iterator[None]:
        with store.use("lone", write=True):
            yield

    for _ in range(3):
        generator = leaking()
        next(generator)
        del generator
        gc.collect()
    lease = store.use("lone", write=True)
    lease.__enter__()
    del lease
    gc.collect()
    with store.use("lone"), store.use("pair", write=True):  # at once: also for the thread that dropped it
        pass
    store.commit()


def test_frozen_blocks_are_read_only(store: TierStore) -> None:
    with pytest.raises(FrozenError) as caught, store.use("frozen", write=True):
        pass
    assert caught.value.block == "frozen"
    assert caught.value.remedy
    with pytest.raises(FrozenError), store.use("frozen", "lone", write={"lone", "frozen"}):
        pass
    with pytest.raises(FrozenError):
        store.write("frozen", torch.tensor([8]))
    with store.use("frozen", "lone", write="lone") as (frozen, _):
        assert frozen.tolist() == [7]
    assert store.info("lone").leases == 0
    assert store.info("frozen").frozen


def test_names_of_write_must_be_among_those_used(store: TierStore) -> None:
    with pytest.raises(LeaseError, match="pair") as caught:
        store.use("lone", write=["pair"])
    assert caught.value.remedy
    with pytest.raises(LeaseError):
        store.use(write="lone")
    with pytest.raises(BlockNotFoundError), store.use("nobody", write="nobody"):
        pass


def test_a_timeout_ends_the_wait_and_leaves_nothing(store: TierStore) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store.use("lone", write=True):
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    for timeout in (0, 0.05, -1.0):
        start = time.monotonic()
        with pytest.raises(LeaseTimeoutError, match="'pair', 'lone'") as caught, store.use("pair", "lone", timeout=timeout):
            pass
        assert isinstance(caught.value, TimeoutError)
        assert timeout <= 0 or caught.value.cause == "lease"
        assert caught.value.remedy
        assert time.monotonic() - start < 5
    assert store.info("pair").leases == 0
    with store.use("pair", write=True, timeout=5):
        pass
    leave.set()
    thread.join()
    with store.use("lone", write=True, timeout=5):
        pass


def test_info_tells_what_is_there(store: TierStore) -> None:
    info = store.info("pair")
    assert info.tensors["weight"].shape == (3, 4)
    assert info.tensors["weight"].dtype == torch.float32
    assert info.tensors["bias"].nbytes == 32
    assert info.nbytes == 4096
    assert info.tiers == ("ram",)
    assert info.dirty
    store.commit()
    assert store.info("pair").tiers == ("ram", "nvme")
    with store.use("pair", write=True):
        pass
    assert store.info("pair").tiers == ("gpu",)
    store.flush()
    assert not store.info("pair").dirty
    assert "nvme" in store.info("pair").tiers
    store.evict("pair")
    assert store.info("pair").tiers == ("nvme",)
    assert sorted(store) == ["frozen", "lone", "pair"]
    assert len(store) == 3
    assert "pair" in store
    assert "nobody" not in store


def test_leases_in_inference_mode(store: TierStore) -> None:
    """Their tensors are kept for later leases: these count writes, and are what autograd saves."""
    for _ in range(2):
        with torch.inference_mode(), store.use("pair") as pair:
            assert pair["weight"].sum().item() == pair["weight"].sum().item()
    with store.use("pair", write=True) as pair:
        weight = pair["weight"].requires_grad_()
        (weight * weight).sum().backward()
        assert torch.equal(weight.grad, 2 * weight.detach())
