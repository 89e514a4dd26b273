"""HTML from nested calls; text is escaped as it enters an element, so escaping is automatic."""

import html
import re
from collections.abc import Container
from typing import NamedTuple

_VOID = ("img", "meta", "source", "wbr")


class Markup(str):
    """Text that already is HTML; all other text is escaped on entering an element."""


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Returns `<name attributes>children</name>`.

    Args:
      name: tag name.
      *children: Markup, anything convertible to str, or None to omit.
      **attributes: a trailing underscore (`class_`) is stripped, others (`aria_hidden`) become
        hyphens; None omits the attribute.
    """
    texts = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    opening = f"<{name}{''.join(texts)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(*children)}</{name}>")


def join(*children: object) -> Markup:
    """Returns the concatenated children of an element."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )


def breakable(path: str) -> Markup:
    """Returns a layer path that may wrap after slashes and underscores."""
    return Markup(re.sub("([/_])", r"\1<wbr>", html.escape(path)))


class Section(NamedTuple):
    """A section of the page, linked as `#name`."""

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
    wide: Container[int] = (),
    last: bool = False,
) -> Markup:
    """Returns a table in a box that scrolls horizontally on narrow pages.

    Args:
      caption: the table's caption.
      columns: headings.
      rows: cells, one per column; the first is the row's heading.
      texts: indices of the columns with text rather than numbers.
      wide: indices of the columns that narrow screens leave out.
      last: whether the last row is a total.
    """
    kinds = [
        ("text" if i in texts else "number") + (" wide" if i in wide else "")
        for i in range(len(columns))
    ]
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
    """Returns `content` in a box that scrolls horizontally, also by keyboard."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def facts(pairs: dict[str, object]) -> Markup:
    """Returns a list of names and values; empty values are omitted."""
    shown = {name: value for name, value in pairs.items() if value not in (None, "")}
    entries = (
        element("div", element("dt", name), element("dd", value)) for name, value in shown.items()
    )
    return element("dl", *entries)


def folded(title: str, *children: object) -> Markup:
    """Returns a collapsed block that opens when its title is clicked."""
    return element("details", element("summary", title), *children)


def _cell(name: str, content: object, kind: str, scope: str | None = None) -> Markup:
    return element(name, content, class_=kind, scope=scope)
