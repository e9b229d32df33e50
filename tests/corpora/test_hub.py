"""Corpora of the hub, with the hub and its library replaced: no test opens a connection."""

import itertools

import datasets
import huggingface_hub
import pytest

from lmpress.corpora import evaluation_split, hub, load_corpus
from lmpress.errors import RequestError


@pytest.fixture
def answering(monkeypatch):
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)


def test_wikitext2_is_the_text_of_the_file(monkeypatch, answering):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return {"text": ["", " = Title = \n", "", " A line . \n"]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus("wikitext2", "test")
    assert corpus.documents == (" \n = Title = \n \n A line . \n",)
    assert (corpus.name, corpus.split) == ("wikitext2", "test")
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_c4_is_streamed_and_cut(monkeypatch, answering):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return ({"text": f"document {i}", "url": "u"} for i in itertools.count())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = load_corpus("c4", "validation")
    assert len(corpus.documents) == hub.C4_DOCUMENTS
    assert corpus.documents[:2] == ("document 0", "document 1")
    (args, options) = asked[0]
    assert args == ("allenai/c4",)
    assert options["streaming"]
    assert options["data_files"] == {"validation": hub.C4_SHARDS["validation"]}


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
@pytest.mark.parametrize("answers", [True, False])
def test_out_of_reach_is_a_refusal_that_offers_the_other_ways(monkeypatch, name, answers):
    seen = []

    def load_dataset(*_, **__):
        config, constants = datasets.config, huggingface_hub.constants
        seen.append((config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE, config.STREAMING_OPEN_MAX_RETRIES))
        raise ConnectionError("Couldn't reach it\nand a long explanation")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    retries = datasets.config.STREAMING_OPEN_MAX_RETRIES
    monkeypatch.setattr(hub, "_hub_answers", lambda: answers)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        RequestError, match=rf"{name} is out of reach \(Couldn't reach it\).*`self`.*file:PATH"
    ):
        load_corpus(name)
    assert seen == [(not answers, not answers, 1)]  # no long retries where nothing answers
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert retries == datasets.config.STREAMING_OPEN_MAX_RETRIES > 1


def test_a_break_in_the_middle_of_the_stream_is_a_refusal_too(monkeypatch, answering):
    def rows():
        yield {"text": "one"}
        raise TimeoutError("read timed out")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(RequestError, match=r"read timed out.*file:PATH"):
        load_corpus("c4")


def test_the_probe_is_short_and_says_no_to_any_failure(monkeypatch):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert not hub._hub_answers()
    assert asked == [(huggingface_hub.constants.ENDPOINT, hub.PROBE_SECONDS)]


def test_an_unknown_split_is_refused():
    with pytest.raises(RequestError, match=r"no split 'tset'.*train, validation, test"):
        load_corpus("wikitext2", "tset")
    with pytest.raises(RequestError, match="no split 'test'"):
        load_corpus("c4", "test")


@pytest.mark.parametrize(("name", "split"), [("wikitext2", "test"), ("c4", "validation")])
def test_evaluation_asks_for_a_split_that_there_is(monkeypatch, answering, name, split):
    asked = []

    def load_dataset(*_, **options):
        asked.append(options["split"])
        return {"text": ["a"]} if name == "wikitext2" else [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_corpus(name, evaluation_split(name)).split == split
    assert load_corpus(name).split == "train"  # calibration never reads what evaluation does
    assert asked == [split, "train"]
