"""The text: which files, which split, which windows, and the entropies that a model must beat."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tierstore.demo import corpus


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.load()


def write_tree(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_the_split_is_the_same_every_time(text: corpus.Corpus) -> None:
    again = corpus.load()
    assert again.digest == text.digest
    assert np.array_equal(again.train, text.train)
    assert np.array_equal(again.held_out, text.held_out)


def test_the_split_holds_out_about_one_file_in_twenty(text: corpus.Corpus) -> None:
    train, held_out = text.num_files
    assert 0.02 < held_out / (train + held_out) < 0.09
    assert len(text.held_out) > 100_000


def test_a_file_more_moves_no_other_across() -> None:
    names = [f"package/module{i}.py" for i in range(400)]
    held_out = {name for name in names if corpus.is_held_out(name)}
    # Frozen: another rule would train on what earlier runs held out.
    assert sorted(held_out)[:4] == ["package/module118.py", "package/module198.py", "package/module21.py", "package/module252.py"]
    assert 5 <= len(held_out) <= 40


def test_tests_and_installed_packages_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "LEAST_BYTES", 1)
    monkeypatch.setattr(corpus, "is_held_out", lambda name: name == "b.py")
    write_tree(
        tmp_path,
        {
            "c.py": b"ccc",
            "a/inner.py": b"aaa",
            "b.py": b"held",
            "test/big.py": b"no",
            "a/tests/t.py": b"no",
            "site-packages/x/y.py": b"no",
            "data.txt": b"no",
            "test.py": b"yes",
        },
    )
    found = corpus.load(tmp_path)
    assert found.train.tobytes() == b"aaacccyes"  # in order of their names
    assert found.held_out.tobytes() == b"held"
    assert found.num_files == (3, 1)


def test_a_python_without_sources_is_told_so(tmp_path: Path) -> None:
    write_tree(tmp_path, {"only.py": b"pass"})
    with pytest.raises(corpus.CorpusError, match=r"needs 1,000,000 bytes .* has 4\. Use a Python that ships its sources"):
        corpus.load(tmp_path)


def test_each_window_is_learnt_once_before_any_comes_again(text: corpus.Corpus) -> None:
    small = corpus.Corpus(text.train[:1001], text.held_out, (1, 1), "")
    order = corpus.training_order(small, 100, seed=3)
    assert sorted(order.tolist()) == list(range(10))
    assert order.tolist() == corpus.training_order(small, 100, seed=3).tolist() != corpus.training_order(small, 100, seed=4).tolist()
    seen = []
    for position in range(0, 12, 4):
        inputs, targets = corpus.training_batch(small, order, position, 4, 100)
        assert inputs.shape == targets.shape == (4, 100)
        assert inputs[:, 1:].equal(targets[:, :-1])
        seen += [bytes(row.tolist()) for row in inputs]
    assert len(set(seen[:10])) == 10
    assert seen[10:] == seen[:2]


def test_held_out_windows_spread_over_the_whole_split(text: corpus.Corpus) -> None:
    batches = corpus.held_out_batches(text, 10, 4, 64)
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
    last = batches[-1][1][-1].tolist()
    place = text.held_out.tobytes().rindex(bytes(last))
    assert place > 0.85 * len(text.held_out)


def test_entropies_of_a_case_done_by_hand() -> None:
    train = np.frombuffer(b"aabab", np.uint8)
    total = 5 + 256
    p_a, p_b = 4 / total, 3 / total  # 3 + 1 and 2 + 1 counts
    # Pairs aa, ab, ba, ab: after a (3 seen) b twice, after b (1 seen) a once; the unigram counts as one more observation.
    b_after_a, a_after_b = (2 + p_b) / (3 + 1), (1 + p_a) / (1 + 1)
    previous, following = np.frombuffer(b"ab", np.uint8), np.frombuffer(b"ba", np.uint8)
    unigram, bigram = corpus.entropies(train, previous, following)
    assert unigram == pytest.approx(-(math.log(p_b) + math.log(p_a)) / 2)
    assert bigram == pytest.approx(-(math.log(b_after_a) + math.log(a_after_b)) / 2)


def test_entropies_of_the_sources_are_those_known(text: corpus.Corpus) -> None:
    unigram, bigram = corpus.entropies(text.train, text.held_out[:-1], text.held_out[1:])
    assert 3.0 < unigram < 3.6
    assert 2.2 < bigram < 2.7
