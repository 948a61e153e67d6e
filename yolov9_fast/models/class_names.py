"""Classes of weights and of data, matched by name."""

from __future__ import annotations

from collections.abc import Mapping

from yolov9_fast._untrusted import shown


def class_order(own: Mapping[int, str] | None, wanted: Mapping[int, str]) -> list[int] | None:
    """For each class of `wanted`, the index of the same class in `own`.

    Both have the same number of classes. Where `own` has no names (None, or each class is named by its index), classes
    agree by index. None: the names are others.
    """
    indices = list(range(len(wanted)))
    names = [str(index) if own is None else own[index] for index in indices]
    targets = [wanted[index] for index in indices]
    if names == targets:
        return indices
    index_of = {name: index for index, name in enumerate(names)}
    if len(index_of) == len(names) and index_of.keys() == set(targets):
        return [index_of[name] for name in targets]
    return indices if names == [str(index) for index in indices] else None


def name_differences(own: Mapping[int, str], wanted: Mapping[int, str]) -> str:
    """The first class whose names differ, and how many do."""
    differing = [index for index in wanted if own[index] != wanted[index]]
    first = differing[0]
    return (
        f"class {first} is {shown(own[first])} in the weights and {shown(wanted[first])} in the data "
        f"({len(differing)} of {len(wanted)} names differ)"
    )
