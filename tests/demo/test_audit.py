"""The look for tensors that a loop keeps between leases finds them."""

from __future__ import annotations

import pytest
import torch

from tierstore.demo.audit import Audit, AuditError

SHAPE = (61, 67)  # 16 kB of fp32


def test_a_kept_copy_of_a_weight_is_found() -> None:
    audit = Audit()
    audit.begin([SHAPE], {3}, [])
    audit.between_leases(3, "after forward", [])
    kept = torch.zeros(SHAPE, dtype=torch.int32)
    audit.between_leases(2, "after forward", [])  # not a step to look at
    with pytest.raises(AuditError, match=r"after forward of step 3 the loop still held 1 tensors outside the store: \(61, 67\)"):
        audit.between_leases(3, "after forward", [])
    assert audit.looks == 2
    del kept


def test_kept_activations_must_be_declared() -> None:
    audit = Audit()
    inputs = torch.zeros(8, *SHAPE)
    assert [tensor is inputs for tensor in audit.find([])] == [True]
    assert audit.find([inputs]) == []


def test_tokens_and_small_tensors_may_stay() -> None:
    audit = Audit()
    audit.begin([(3, 5)], {0}, [])
    kept = [torch.zeros(3, 5), torch.zeros(64, 128, dtype=torch.int64)]
    assert audit.find([]) == []
    del kept


def test_what_was_there_before_the_run_is_not_the_loops() -> None:
    earlier = torch.zeros(SHAPE)
    audit = Audit()
    audit.begin([SHAPE], {0}, [])
    assert audit.find([]) == []
    del earlier
    later = [torch.zeros(SHAPE) for _ in range(3)]  # perhaps at the same address
    assert len(audit.find([])) == 3
    del later


def test_views_of_the_arena_are_the_stores() -> None:
    audit = Audit()
    view = torch.zeros(1 << 16, dtype=torch.uint8)[: 61 * 67 * 4].view(torch.float32).view(SHAPE)
    assert any(tensor is view for tensor in audit.find([]))
    audit.begin([SHAPE], {0}, [view])
    assert audit.find([]) == []
