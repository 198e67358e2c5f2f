import re

import pytest

from chatbind_cli.download.catalogue import STAGES, entries, for_stage

# Every dataset, weight and repository that the seed links to or tells the reader to get.
SEED_FILES = {
    "chat.json",
    "blip_laion_cc_sbu_558k.json",
    "llava_instruct_150k.json",
    "llava_instruct_80k.json",
    "conversation_58k.json",
    "detail_23k.json",
    "complex_reasoning_77k.json",
    "qa90_questions.jsonl",
    "qa90_gpt4_answer.jsonl",
    "caps_boxes_coco2014_val_80.jsonl",
    "rule.json",
    "imagebind_huge.pth",
}
SEED_REPOS = {"dreamerlin/chatbind-7b-delta", "dreamerlin/chatbind-7b-pretrain-projector"}


def test_every_artefact_of_the_seed_is_there():
    files = {file["to"] for entry in entries().values() for file in entry.files}
    assert files >= SEED_FILES
    assert {entry.hub for entry in entries().values()} >= SEED_REPOS


@pytest.mark.parametrize("entry", entries().values(), ids=lambda entry: entry.name)
def test_every_entry_says_what_a_reader_needs(entry):
    assert entry.title and entry.purpose and entry.licence and entry.commands and entry.folder
    assert re.fullmatch(r"[a-z0-9-]+", entry.name)
    assert set(entry.stages) <= set(STAGES)
    assert entry.hub or all("url" in file or "hub" in file for file in entry.files)
    for file in entry.files:
        assert sum(key in file for key in ("path", "url", "hub")) == 1
        assert re.fullmatch("[0-9a-f]{64}", file.get("sha256", "0" * 64))
        assert re.fullmatch("[0-9a-f]{32}", file.get("md5", "0" * 32))
        # What comes from a plain URL has nobody else to vouch for it.
        assert "url" not in file or ("bytes" in file and ("sha256" in file or "md5" in file))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_plan_with_one_encoder_at_most(stage):
    names = [entry.name for entry in for_stage(stage) if "encode --encoder" in entry.commands]
    assert for_stage(stage)
    assert names == ([] if stage == "review" else ["imagebind-huge"])


def test_the_sizes_of_languagebind_are_those_of_its_parameters_as_float32():
    counts = (427_616_513, 528_623_873, 427_960_577, 428_009_729, 428_009_729)
    entry = entries()["languagebind"]
    assert [file["about"] for file in entry.files] == [f"about {4e-9 * n:.1f} GB" for n in counts]
    assert entry.about == f"about {4e-9 * sum(counts):.1f} GB"


def test_the_evaluation_files_are_the_published_ones(shared_data):
    import hashlib

    for file in entries()["llava-eval-90"].files:
        data = (shared_data / "llava" / file["to"]).read_bytes()
        assert file["bytes"] == len(data)
        assert file["sha256"] == hashlib.sha256(data).hexdigest()
