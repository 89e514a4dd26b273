"""HTML from nested calls: text is escaped where it enters an element, so it cannot be forgotten."""

import html
import re
from collections.abc import Container
from typing import NamedTuple

_VOID = ("img", "meta", "source", "wbr")


class Markup(str):
    """Text that is HTML already; any other text is escaped when it becomes part of an element."""


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Returns `<name attributes>children</name>`.

    Args:
      name: of the element.
      *children: Markup, anything with a text, or None for nothing.
      **attributes: by name, `class_` for a word that Python keeps and `aria_hidden` for a hyphen;
        None leaves one out.
    """
    texts = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = f"<{name}{''.join(texts)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Returns the children of an element, one after the other."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )


def breakable(path: str) -> Markup:
    """Returns a layer's path that may wrap after its slashes and underscores."""
    return Markup(re.sub("([/_])", r"\1<wbr>", html.escape(path)))


class Section(NamedTuple):
    """A part of the page; `#name` leads to it."""

    name: str
    title: str
    html: Markup


def section(name: str, title: str, *children: object) -> Section:
    """Returns a section with its heading."""
    whole = element("section", element("h2", title), *children, id=name)
    return Section(name, title, join(Markup("\n"), whole))


def table(
    caption: str,
    columns: list[object],
    rows: list[list[object]],
    *,
    texts: Container[int] = (0,),
    last: bool = False,
) -> Markup:
    """Returns a table in a box that scrolls by itself where the page is narrow.

    Args:
      caption: what the table shows.
      columns: headings.
      rows: cells, as many as there are columns; the first one heads its row.
      texts: the columns that hold text, not numbers.
      last: whether the last row is a total.
    """
    kinds = ["text" if i in texts else "number" for i in range(len(columns))]
    head = element("tr", *(_cell("th", c, k, "col") for c, k in zip(columns, kinds, strict=True)))
    lines = [
        element(
            "tr",
            _cell("th", row[0], kinds[0], "row"),
            *(_cell("td", c, k) for c, k in zip(row[1:], kinds[1:], strict=True)),
        )
        for row in rows
    ]
    foot = element("tfoot", lines.pop()) if last else None
    body = element("tbody", *lines)
    whole = element("table", element("caption", caption), element("thead", head), body, foot)
    return scrolling(caption, whole)


def scrolling(label: str, content: Markup) -> Markup:
    """Returns `content` in a box that scrolls sideways, by keyboard too."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def facts(pairs: dict[str, object]) -> Markup:
    """Returns a list of names and values; those without a value are left out."""
    shown = {name: value for name, value in pairs.items() if value not in (None, "")}
    entries = (
        element("div", element("dt", name), element("dd", value)) for name, value in shown.items()
    )
    return element("dl", *entries)


def folded(title: str, *children: object) -> Markup:
    """Returns what shows when its title is opened."""
    return element("details", element("summary", title), *children)


def _cell(name: str, content: object, kind: str, scope: str | None = None) -> Markup:
    return element(name, content, class_=kind, scope=scope)
