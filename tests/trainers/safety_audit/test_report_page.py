"""The page of an audit: whole in itself, nothing of a text runs or is seen before it is opened."""

import asyncio
import re
from html.parser import HTMLParser

import pytest

from hf_iclr.trainers.safety_audit.report import Measure
from tests.trainers.safety_audit.test_audit import hand_made
from tests.vision.annotation.chromium import CHROMIUM, open_tab


EVIL = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"> secret"


@pytest.fixture
def report():
    """Nine refusals become four; a prompt and an answer hold markup."""
    before = hand_made()
    now = hand_made(none=(True,) * 4 + (False,) * 6, before=before)
    now.measures[0].texts = [EVIL] * 10
    now.asked = {"prompts": [EVIL, [{"role": "user", "content": "a chat"}], *["p"] * 8]}
    now.kl.append({"token": 2, "n": 8, "kl": 0.1})
    now.measures.append(Measure("prefill", "20", "continuation", [True] * 3 + [None] * 7))
    return now


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.words, self.inside = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "polyline", "line", "circle", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "details" in self.open and "summary" not in self.open:
            self.inside.append(data)
        elif "style" not in self.open:
            self.words += data


def test_page(report):
    text = report.to_html()
    page = Elements(text)
    tags = [tag for tag, _ in page.seen]
    assert not page.open and not {"script", "img", "link", "iframe"} & set(tags)
    assert not re.search(r'(?:src|href)="', text) and "secret" not in page.words and "secret" in "".join(page.inside)
    assert tags.count("details") == 5 and not any("open" in a for tag, a in page.seen if tag == "details")
    assert "Crossed: min_refusal is 0.95, but the refusal rate is 0.400." in page.words
    assert "Prompts that changed: 5" in page.words and "token 1: 2.000 nats, n = 9" in page.words
    titles = re.findall(r"(\S+), k = (\d+): (\d+) of (\d+) refused", page.words)
    assert ("audited", "0", "4", "10") in titles and ("audited", "20", "3", "3") in titles
    assert ("before", "0", "9", "10") in titles
    high = 250 - 220 * report.to_frame()["high"][0]
    assert f'y2="{high}"' in text  # the interval is Wilson's


def test_page_without_texts(report, tmp_path):
    report.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "secret" not in page and "<details" not in page and "refused before, not now" in page
    report.save(tmp_path, with_texts=True)
    assert "secret" in (tmp_path / "report.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_page_in_chromium(report, tmp_path):
    (tmp_path / "report.html").write_text(report.to_html())

    async def look():
        async with open_tab((tmp_path / "report.html").as_uri(), tmp_path / "profile") as tab:
            assert await tab.run("document.title") == "Safety audit of org/model"
            assert "secret" not in await tab.run("document.body.innerText")
            assert await tab.run("document.querySelectorAll('#curve circle').length") == 6
            inside = "document.querySelector('#curve svg').getBoundingClientRect().width > 300"
            assert await tab.run(inside)
            await tab.run("document.querySelector('details.change').scrollIntoView()")
            await tab.press("details.change summary")
            await tab.until("document.querySelector('details.change').open")
            assert "secret" in await tab.run("document.body.innerText")
            assert await tab.run("document.title") == "Safety audit of org/model"  # nothing of it ran

    asyncio.run(look())
