"""Name the roles of a table's columns, and the columns of public data sets.

A table has one of four shapes. Each shape can express the preference in several ways:

=================  ====================================================  =========================================================
shape              a row                                                 preference
=================  ====================================================  =========================================================
winner, loser      a pair whose order is known                           none needed; votes or preference_0 of the winner
image_0, image_1   a pair                                                label_0, votes_0 and votes_1, votes, or preference_0
images             a ranking: a list of pictures of one caption          ranks (1 is best) or scores (more is better), a list each
image              one picture of a ranking, whose rows are neighbours   rank or score; group names the ranking, default: caption
=================  ====================================================  =========================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dde_ds.errors import UserError, nearest

ROLES = {
    "caption": "text, or the messages of a conversation",
    "winner": "the preferred picture",
    "loser": "the other one",
    "image_0": "a picture",
    "image_1": "the other one",
    "label_0": "1 where image_0 is preferred, 0 where image_1 is, anything between for a tie",
    "votes_0": "how many, or how much weight, prefer image_0 or the winner",
    "votes_1": "likewise image_1 or the loser",
    "votes": "both numbers as a list",
    "preference_0": "the share in [0,1] that prefers image_0 or the winner",
    "images": "a list of pictures",
    "ranks": "a list of their ranks, lower is better",
    "scores": "a list of their scores, higher is better",
    "image": "a picture",
    "rank": "its rank, lower is better",
    "score": "its score, higher is better",
    "group": "what the pictures of one ranking have in common",
}
VOTES = (("votes_0", "votes_1"), ("votes",), ("preference_0",))
# For the picture columns of each shape, the sets of columns that express the preference. () stands for a known order, or for pairs that
# are to be labelled later.
SHAPES: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {
    ("winner", "loser"): ((), *VOTES),
    ("image_0", "image_1"): ((), ("label_0",), *VOTES),
    ("images",): (("ranks",), ("scores",)),
    ("image",): (("rank",), ("score",), ("rank", "group"), ("score", "group")),
}
PAIRS = ("all", "adjacent", "best-worst")
"""The pairs to take from a ranking: every two pictures, neighbours in the ranking, or the best with the worst."""

# tools/README.md gives the source of each preset. Where a name has several variants, the first with all its columns present counts.
PRESETS: dict[str, tuple[dict[str, str], ...]] = {
    "pickapic": ({"caption": "caption", "image_0": "jpg_0", "image_1": "jpg_1", "label_0": "label_0"},),
    "hpdv2": (
        {"caption": "prompt", "images": "file_path", "scores": "human_preference"},
        {"caption": "prompt", "images": "image_path", "scores": "human_preference"},
        {"caption": "prompt", "images": "image_path", "ranks": "rank"},
        {"caption": "prompt", "images": "image", "ranks": "rank"},
    ),
    "hpdv3": ({"caption": "prompt", "winner": "path1", "loser": "path2"},),
    "imagereward": (
        {"caption": "prompt", "image": "image_path", "rank": "rank", "group": "prompt_id"},
        {"caption": "prompt", "image": "image", "rank": "rank", "group": "prompt_id"},
    ),
    "rapidata": (
        {"caption": "prompt", "image_0": "image1", "image_1": "image2", "votes_0": "votes_image1", "votes_1": "votes_image2"},
        {
            **{"caption": "prompt", "image_0": "image1", "image_1": "image2"},
            "votes_0": "weighted_results_image1_preference",
            "votes_1": "weighted_results_image2_preference",
        },
    ),
    "open-image-preferences": ({"caption": "prompt", "winner": "chosen", "loser": "rejected"},),
    "trl": ({"caption": "prompt", "winner": "chosen", "loser": "rejected"},),
}


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """Return the column name of each role from ``ROLE=NAME`` words.

    Raises:
        UserError: a word has another form, a role is unknown, or a role is given twice.
    """
    columns: dict[str, str] = {}
    for word in words:
        role, equals, name = word.partition("=")
        if not equals or not name:
            raise UserError(f"columns {word!r}: expected ROLE=NAME, such as caption=prompt")
        if role not in ROLES:
            raise UserError(f"columns {word!r}: {role!r} is no role{nearest(role, ROLES)}")
        if role in columns:
            raise UserError(f"columns: {role} is given twice")
        columns[role] = name
    return columns


def choose_columns(where: str, names: Iterable[str], columns: Mapping[str, str], preset: str | None = None) -> dict[str, str]:
    """Return the column of each role in a table with these column ``names``. ``columns`` overrides the preset.

    Raises:
        UserError: the preset is unknown, a column does not exist, or the roles form no shape.
    """
    names = list(names)
    if preset is not None and preset not in PRESETS:
        raise UserError(f"preset {preset!r}{nearest(preset, PRESETS)}")
    variants = [{**variant, **columns} for variant in PRESETS[preset]] if preset else [dict(columns)]
    chosen = next((variant for variant in variants if set(variant.values()) <= set(names)), variants[0])
    for role, name in chosen.items():
        if name not in names:
            raise UserError(
                f"input {where}: no column {name!r} (for {role}){nearest(name, names)}; its columns: {', '.join(names)}"
            )
    check_shape(chosen)
    return chosen


def check_shape(columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the roles of the picture columns in a set of roles.

    Raises:
        UserError: the roles form no shape. The message names the roles that are missing or too many.
    """
    if "caption" not in columns:
        raise UserError("columns: caption is missing; name the column of the prompts as caption=NAME")
    shapes = [shape for shape in SHAPES if set(shape) & set(columns)]
    if len(shapes) != 1 or not set(shapes[0]) <= set(columns):
        known = ", or ".join(" and ".join(shape) for shape in SHAPES)
        raise UserError(f"columns: the pictures are {known}; given: {', '.join(columns)}")
    rest = set(columns) - {"caption", *shapes[0]}
    if rest not in [set(verdict) for verdict in SHAPES[shapes[0]]]:
        known = ", or ".join(" and ".join(verdict) for verdict in SHAPES[shapes[0]] if verdict)
        given = " and ".join(sorted(rest)) or "nothing"
        raise UserError(f"columns: {given} beside {' and '.join(shapes[0])}; expected {known}")
    return shapes[0]
