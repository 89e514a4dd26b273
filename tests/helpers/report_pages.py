"""Parses a report page, for its tests."""

import base64
import html.parser
import re
import xml.etree.ElementTree as ElementTree

VOID = {"img", "meta", "source", "wbr"}


class Page(html.parser.HTMLParser):
    """Parses a page and asserts proper nesting."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), names
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub("\n", "", "".join(self.texts))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def assert_self_contained(page, path):
    source = path.read_text(encoding="utf-8")
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "srcset", "href", "xlink:href", "data", "action"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/")), (tag, name, value)
        assert "url(" not in attributes.get("style", "")
    style = re.search(r"<style>(.*?)</style>", source, re.S)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style
    for data in re.findall(r"data:image/svg\+xml;base64,([^\" ]+)", source):
        picture = ElementTree.fromstring(base64.b64decode(data))
        for part in picture.iter():
            assert part.tag.rpartition("}")[2] not in ("script", "image", "foreignObject")
            for name, value in part.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
