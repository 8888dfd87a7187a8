"""Sentences about sizes of data that mislead."""

from __future__ import annotations

from mhla_lightning.data.modules.advice import advice


def test_large_sets_need_no_sentence() -> None:
    assert list(advice(samples=1000, batch_size=1000, val_samples=100)) == []
    assert list(advice(samples=1000, batch_size=10, val_samples=0)) == []


def test_fewer_samples_than_a_batch_are_named() -> None:
    (sentence,) = advice(samples=99, batch_size=100, val_samples=100)
    assert "99 samples and data.batch_size is 100" in sentence


def test_a_small_validation_is_named() -> None:
    (sentence,) = advice(samples=200, batch_size=100, val_samples=40)
    assert "40 samples: one of them is 2.5% of an accuracy" in sentence
