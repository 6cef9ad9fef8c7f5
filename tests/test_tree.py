"""Slash paths, the one regex primitive, and diffs that fit a screen."""

import pytest

from t5x_lite import tree
from t5x_lite.errors import nearest


def test_flatten_and_back():
    nested = {"b": {"y": 2, "x": {"z": 3}}, "a": 1}
    flat = {"a": 1, "b/x/z": 3, "b/y": 2}
    assert tree.flatten(nested) == flat and list(tree.flatten(nested)) == sorted(flat)
    assert tree.unflatten(flat) == nested
    with pytest.raises(AssertionError, match="leaf and a branch"):
        tree.unflatten({"a/b": 1, "a": 2})


def test_map_with_path():
    out = tree.map_with_path(lambda path, x, y: (path, x + y), {"a": {"b": 1}}, {"a": {"b": 2}})
    assert out == {"a": {"b": ("a/b", 3)}}
    with pytest.raises(AssertionError, match="missing   a"):
        tree.map_with_path(lambda path, x, y: x, {"a": 1}, {"b": 1})


def test_the_first_rule_that_matches_the_whole_path_wins():
    rules = (("encoder/.*", "first"), (".*scale", "second"), (".*", "last"))
    assert tree.first_match(rules, "encoder/scale") == (0, "first")
    assert tree.first_match(rules, "decoder/scale") == (1, "second")
    assert tree.first_match(rules[:1], "my/encoder/x") is None


def test_diff_names_what_stands_between_two_trees():
    diff = tree.diff({"kernel": 2, "scale": 1}, {"kernal": 2, "scale": 3}, lambda a, b: a == b)
    assert (diff.missing, diff.extra, diff.mismatched) == (("kernel",), ("kernal",),
                                                           (("scale", 1, 3),))
    assert str(diff).splitlines() == ["  missing   kernel did you mean 'kernal'?",
                                      "  extra     kernal",
                                      "  mismatch  scale: expected 1, found 3"]
    assert not tree.diff({"a": 1}, {"a": 1})
    many = tree.diff({f"p{i}": 1 for i in range(20)}, {})
    assert len(str(many).splitlines()) == 16 and str(many).endswith("… 5 more")


def test_nearest():
    assert nearest("embed_dimm", ["embed_dim", "mlp_dim"]) == " did you mean 'embed_dim'?"
    assert nearest("zzz", ["embed_dim"]) == ""
