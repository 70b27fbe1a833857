"""What users ask a model to write and what they get back: completions, filled gaps, translations, and errors."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny import NLU, S2S, ankh, ankh3, ankh3_without_files, encoder_alone, igbert, prostt5, prott5
from torch import Tensor

import plm
from plm.models.t5 import EOS, START, T5
from plm.tokens import Tokenizer

RESIDUES = set("ACDEFGHIKLMNPQRSTVWYXUBZO")
STATES = set("acdefghiklmnpqrstvwy")
MODELS = pytest.mark.parametrize("make", [prott5, ankh, ankh3])


class Encoded:
    """The ids that go to the encoder, prompt by prompt."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[list[int]] = []
        join = T5.join

        def watched(net: T5, state: Any, prompts: Sequence[Any], counts: Sequence[int]) -> None:
            self.prompts += [[int(token) for token in ids] for ids in prompts]
            join(net, state, prompts, counts)

        monkeypatch.setattr(T5, "join", watched)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    return Encoded(monkeypatch)


def dictate(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Let every model write these ids and then the end, one text at a time."""
    step = T5.step

    def told(net: T5, tokens: Tensor, state: Any) -> Tensor:
        logits = step(net, tokens, state)
        (length,) = state.cache.lengths
        token = ids[length - 1] if length <= len(ids) else EOS
        return logits.index_fill(1, torch.tensor([token]), 1e4)

    monkeypatch.setattr(T5, "step", told)


def spelt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text of tokens, special ones included and nothing added."""
    return [tokenizer.vocabulary.index(token) for token in re.findall(r"<[^>]*>|\[[A-Z]+\]|.", text)]


def one(model: plm.Model, prompt: Any, **settings: Any) -> plm.Sample:
    ((sample,),) = plm.generate(model, [prompt], **{"temperature": 0, **settings})
    return sample


# Completions


@MODELS
def test_a_completion_is_the_prompt_and_what_follows(make: Callable[[], plm.Model]) -> None:
    model = make()
    for sample in plm.generate(model, "MKTAYIAKQR", num_samples=5, seed=0)[0]:
        assert sample.ids[0] == START and len(sample.ids) <= 11
        follows = [model.tokenizer.vocabulary[token] for token in sample.ids if token in model.tokenizer.residue_ids]
        assert sample.sequence == "MKTAYIAKQR" + "".join(follows)
        assert sample.filled == ()


@MODELS
@pytest.mark.parametrize(("prompt", "length"), [("MKTAYIA", 15), ("M", 2), ("MKTAYIAKQR", 21), ("MKT", 40)])
def test_length_is_that_of_the_whole_sequence(make: Callable[[], plm.Model], prompt: str, length: int) -> None:
    """Also an odd one: Ankh3's card writes ``int(L / 2)`` residues after as many, and loses one."""
    for sample in plm.generate(make(), prompt, length=length, residues_only=True, num_samples=3, seed=0)[0]:
        assert len(sample.sequence) == length
        assert len(sample.ids) == length - len(prompt) + 1 and sample.stopped_by == "length"
        assert sample.sequence.startswith(prompt) and set(sample.sequence) <= RESIDUES


def test_each_prompt_is_completed_to_the_length() -> None:
    prompts = ["MKTAYIA", "M", "MKTAYIAKQR"]
    for prompt, (sample,) in zip(prompts, plm.generate(ankh(), prompts, length=13, residues_only=True), strict=True):
        assert len(sample.sequence) == 13 and sample.sequence.startswith(prompt)


def test_bounds_count_the_start_token() -> None:
    assert len(one(ankh(), "MKT", max_length=9, min_length=9).ids) == 9
    assert len(one(ankh(), "MKT", max_length=9, min_length=9).log_probs) == 8
    assert len(one(ankh(), "MKTAYIAK", banned=["</s>"]).ids) == 9, "a completion may double its prompt"
    assert len(one(ankh(), "MKT", min_length=30).ids) == 30, "and is longer where it has to be"


def test_only_residues_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models write start tokens, unknowns, prefixes and sentinels, and trained ones could."""
    model = ankh3()
    written = "<pad>L<unk>A[NLU]<extra_id_3>G<pad>"
    dictate(monkeypatch, spelt(model.tokenizer, written))
    sample = one(model, "MK", max_length=20)
    assert sample.sequence == "MKLAG"
    assert model.tokenizer.decode(sample.ids) == f"<pad>{written}</s>"
    assert sample.stopped_by == "end"


@MODELS
def test_residues_only_bans_the_rest(make: Callable[[], plm.Model]) -> None:
    model = make()
    free, held = (
        plm.generate(model, "MKTAYIAKQR", num_samples=30, seed=0, residues_only=only)[0] for only in (False, True)
    )
    special = set(range(len(model.tokenizer.vocabulary))) - {*model.tokenizer.residue_ids, EOS}
    assert any(special & set(sample.ids[1:]) for sample in free), "or there is nothing to ban"
    assert not any(special & set(sample.ids[1:]) for sample in held)
    assert "end" in {sample.stopped_by for sample in held}


def test_banned_tokens_as_text_or_ids() -> None:
    model = ankh()
    tokens = ["X", "<unk>", *"ALGVSREDTI", "<extra_id_0>", 0, 142]
    numbers = {token if isinstance(token, int) else model.tokenizer.vocabulary.index(token) for token in tokens}
    settings: dict[str, Any] = {"num_samples": 20, "max_length": 30, "seed": 0}
    assert any(numbers & set(sample.ids[1:]) for sample in plm.generate(model, "MKT", **settings)[0])
    for only in (False, True):
        samples = plm.generate(model, "MKT", banned=iter(tokens), residues_only=only, **settings)[0]
        assert not any(numbers & set(sample.ids[1:]) for sample in samples)


@pytest.mark.parametrize("token", ["J", "<id_3>", 144, -1, 1.5])
def test_a_banned_token_must_exist(token: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"banned token {token!r} is not in the vocabulary; it has <pad> </s> <unk> A"
    ):
        plm.generate(ankh(), "MKT", banned=[token])


def test_spaces_in_a_prompt_are_not_residues() -> None:
    """They were counted, so that ``length`` was missed, and a translation came out twice as long."""
    model = ankh()
    assert one(model, "M K\tT\n") == one(model, "MKT")
    assert len(one(model, "M K T", length=9, residues_only=True).sequence) == 9
    assert one(prostt5(), "M K T") == one(prostt5(), "MKT")
    assert one(model, "M _ T") == one(model, "M_T")


def test_prompts_of_token_ids_are_read_as_they_are(encoded: Encoded) -> None:
    model = ankh3()
    prompts = [[S2S, 7, 8, 9, EOS], torch.tensor([24, 0, 255]), range(7, 12)]
    found = plm.generate(model, prompts, temperature=0)
    assert sorted(encoded.prompts) == sorted([[S2S, 7, 8, 9, EOS], [24, 0, 255], [7, 8, 9, 10, 11]])
    assert [sample.sequence[:size] for (sample,), size in zip(found, (3, 1, 5), strict=True)] == ["LAG", "M", "LAGSV"]
    assert [len(sample.ids) <= size for (sample,), size in zip(found, (4, 2, 6), strict=True)] == [True] * 3
    rows = torch.tensor([[7, 8, 1], [9, 10, 1]])
    assert plm.generate(model, rows, temperature=0) == plm.generate(model, rows.tolist(), temperature=0)


def test_tasks_go_before_the_prompt(encoded: Encoded) -> None:
    """Of Ankh3 completions ask for S2S and gaps for NLU, unless told otherwise; others have no tasks."""
    model = ankh3()
    for prompt, task, prefix in (
        ("LAG", None, [S2S]),
        ("L_G", None, [NLU]),
        ("LAG", "nlu", [NLU]),
        ("L_G", "s2s", [S2S]),
        ("LAG", "none", []),
    ):
        one(model, prompt, task=task)
        assert encoded.prompts.pop() == [*prefix, 7, 255 if "_" in prompt else 8, 9, EOS]
    for make in (ankh, prott5):
        one(make(), "ALG")
        assert encoded.prompts.pop() == [3, 4, 5, EOS]
    with pytest.raises(ValueError, match="task 's2s' is unknown; ankh has no tasks: leave it out"):
        one(ankh(), "ALG", task="s2s")
    with pytest.raises(ValueError, match="task 'fold' is unknown; ankh3 has the tasks nlu, s2s"):
        one(model, "ALG", task="fold")


def test_ankh3_without_its_vocabulary_file() -> None:
    """Nobody published which token asks for which task."""
    model = ankh3_without_files()
    for prompt, task, token in (("LAG", None, "[S2S]"), ("L_G", None, "[NLU]"), ("LAG", "nlu", "[NLU]")):
        wanted = rf"needs the id of \{token}, .*: put its tokenizer.json or spiece.model beside the weights"
        with pytest.raises(ValueError, match=wanted):
            one(model, prompt, task=task)
    sample = one(model, "LAG", task="none", max_length=40)
    assert sample.sequence.startswith("LAG") and set(sample.sequence) <= RESIDUES


def test_rare_letters_are_read_as_x_and_kept_in_the_sequence(encoded: Encoded) -> None:
    sample = one(prott5(), "MUK")
    assert encoded.prompts == [[19, 23, 14, EOS]]
    assert sample.sequence.startswith("MUK")


# Gaps


FILLINGS = {
    "in order": ("M_AY_L", "<extra_id_0>KV<extra_id_1>W", "MKVAYWL", ("KV", "W")),
    "out of order": ("M_AY_L", "<extra_id_1>W<extra_id_0>KV", "MKVAYWL", ("KV", "W")),
    "the first of two": ("M_AY_L", "<extra_id_0>K<extra_id_1>W<extra_id_0>VV<extra_id_1>G", "MKAYWL", ("K", "W")),
    "one unfilled": ("M_AY_L", "<extra_id_1>W", "MAYWL", ("", "W")),
    "empty": ("M_AY_L", "<extra_id_0><extra_id_1>W", "MAYWL", ("", "W")),
    "nothing": ("M_AY_L", "", "MAYL", ("", "")),
    "no sentinel": ("M_AY_L", "KVW", "MAYL", ("", "")),
    "something before": ("M_AY_L", "KV<extra_id_0>W", "MWAYL", ("W", "")),
    "not of the prompt": ("M_AY", "<extra_id_0>K<extra_id_1>VVV", "MKAY", ("K",)),
    "no residues": ("M_AY", "<extra_id_0>K<unk><pad>V", "MKVAY", ("KV",)),
    "at the ends": ("_AY_", "<extra_id_0>K<extra_id_1>W", "KAYW", ("K", "W")),
    "side by side": ("A__Y", "<extra_id_0>K<extra_id_1>W", "AKWY", ("K", "W")),
    "nothing else": ("_", "<extra_id_0>KK", "KK", ("KK",)),
    "by name": ("M<extra_id_0>AY<extra_id_1>L", "<extra_id_0>KV<extra_id_1>W", "MKVAYWL", ("KV", "W")),
    "other numbers": ("M<extra_id_7>AY<extra_id_2>L", "<extra_id_2>KV<extra_id_7>W", "MWAYKVL", ("W", "KV")),
    "one gap twice": ("M<extra_id_0>AY<extra_id_0>", "<extra_id_0>KV", "MKVAYKV", ("KV", "KV")),
    "two digits": ("M<extra_id_12>A<extra_id_1>", "<extra_id_12>K<extra_id_1>W", "MKAW", ("K", "W")),
}


@MODELS
@pytest.mark.parametrize("name", FILLINGS)
def test_gaps_are_filled(make: Callable[[], plm.Model], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model writes; a sentinel that the prompt has not used to run on into the gap before."""
    prompt, written, sequence, filled = FILLINGS[name]
    model = make()
    dictate(monkeypatch, spelt(model.tokenizer, written))
    sample = one(model, prompt, max_length=20)
    assert model.tokenizer.decode(sample.ids) == f"<pad>{written}</s>"
    assert (sample.sequence, sample.filled) == (sequence, filled)


@MODELS
def test_both_ways_of_writing_a_gap_are_one(make: Callable[[], plm.Model], encoded: Encoded) -> None:
    model = make()
    named, short = one(model, "M<extra_id_0>AY<extra_id_1>L"), one(model, "M_AY_L")
    assert named == short and encoded.prompts[0] == encoded.prompts[1]
    vocabulary = model.tokenizer.vocabulary
    task = "nlu" if model.tokenizer.tasks else None
    assert encoded.prompts[0] == model.tokenizer.encode("M<extra_id_0>AY<extra_id_1>L", task=task)
    assert [vocabulary[token] for token in encoded.prompts[0] if vocabulary[token].startswith("<e")] == [
        *("<extra_id_0>", "<extra_id_1>")
    ]


def test_an_infilling_has_two_tokens_for_each_gap() -> None:
    """And the start and the end; as Ankh's notebook asks for ``2 n + 1``, which has no room for the end."""
    model = prott5()
    assert len(one(model, "M_AY_L", banned=["</s>"]).ids) == 6
    assert len(one(model, "M_AY_L", max_length=9, banned=["</s>"]).ids) == 9


@MODELS
def test_gaps_with_residues_only(make: Callable[[], plm.Model]) -> None:
    """The prompt's own sentinels may still be written, and no others."""
    model = make()
    mine = {model.tokenizer.sentinel(0), model.tokenizer.sentinel(3)}
    settings: dict[str, Any] = {"residues_only": True, "max_length": 40, "min_length": 40, "temperature": 3.0}
    samples = plm.generate(model, "M<extra_id_0>A<extra_id_3>", num_samples=9, seed=0, **settings)[0]
    written = {token for sample in samples for token in sample.ids[1:]}
    assert mine < written <= {*mine, *model.tokenizer.residue_ids}


# Translations


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"num_samples": 3, "seed": 0}, {"temperature": 0, "num_beams": 3}]
)
@pytest.mark.parametrize("task", [None, "aa2fold", "fold2aa"])
def test_a_translation_has_one_letter_for_each(task: str | None, settings: dict[str, Any]) -> None:
    """Of the other alphabet alone; odd lengths and a single letter too."""
    model = prostt5()
    prompts = ["MKTAYIAKQRX", "M", "MKTAYIA"] if task != "fold2aa" else ["dvvaqwlpdkk", "d", "dpvvlvv"]
    for prompt, samples in zip(prompts, plm.generate(model, prompts, task=task, **settings), strict=True):
        for sample in samples:
            assert len(sample.sequence) == len(prompt)
            assert set(sample.sequence) <= (RESIDUES if task == "fold2aa" else STATES)
            assert len(sample.ids) == len(prompt) + 1 and sample.stopped_by == "length"


def test_a_translation_asks_for_its_task(encoded: Encoded) -> None:
    model = prostt5()
    one(model, "ALU")
    one(model, "al", task="fold2aa")
    assert encoded.prompts == [[149, 3, 4, 23, EOS], [148, 128, 129, EOS]]


def test_a_translation_within_bounds() -> None:
    """They may be given; its letters stay those of the other alphabet."""
    sample = one(prostt5(), "MKTAYIA", min_length=3, max_length=20)
    assert set(sample.sequence) <= STATES and 2 <= len(sample.sequence) <= 19
    assert len(one(prostt5(), "MKTAYIA", min_length=15).ids) == 15


@pytest.mark.parametrize(
    ("prompt", "task", "wrong"),
    [
        ("M_A", None, "a translation has no gaps"),
        ("M<extra_id_0>A", "aa2fold", "a translation has no gaps"),
        ("MKA", "none", "without a task"),
        ("MKa", None, "Lower case are 3Di states, for task='fold2aa'"),
        ("dvA", "fold2aa", "Foldseek writes 3Di states in upper case"),
    ],
)
def test_what_cannot_be_translated(prompt: str, task: str | None, wrong: str) -> None:
    with pytest.raises(plm.InputError, match=wrong):
        one(prostt5(), prompt, task=task)


# What is asked for


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"num_samples": 0}, "num_samples and num_beams must be at least 1; got 0 and 1"),
        ({"num_beams": 0}, "num_samples and num_beams must be at least 1; got 1 and 0"),
        ({"num_beams": 3}, "beam search draws nothing: give temperature=0 with num_beams, or num_beams=1"),
        ({"num_beams": 2, "num_samples": 3, "temperature": 0}, "2 beams hold no 3 samples; give num_beams=3"),
        ({"temperature": 0, "top_k": 3}, "with temperature=0 the most probable token is taken; leave out top_k"),
        ({"temperature": 0, "top_p": 0.9}, "with temperature=0 the most probable token is taken; leave out top_k"),
        ({"temperature": 0, "num_samples": 2}, "without drawing, all 2 samples would be the same; raise the temp"),
        ({"temperature": -1}, "temperature must be above 0, or 0 for the most probable token; got -1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, 1 for none; got 0"),
        ({"length": 3}, "length=3, but the prompt has 3 residues already; give more"),
        ({"length": 9, "max_length": 5}, "takes the place of max_length"),
        ({"length": 9, "min_length": 5}, "takes the place of max_length"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        plm.generate(ankh(), "MKT", **settings)


@pytest.mark.parametrize(("model", "prompt"), [(ankh(), "M_T"), (prostt5(), "MKT")], ids=["infilling", "translation"])
def test_length_is_for_completions(model: plm.Model, prompt: str) -> None:
    with pytest.raises(ValueError, match="length is of a completed sequence"):
        plm.generate(model, prompt, length=9)


def test_models_that_do_not_write(model: plm.Model) -> None:
    for silent in (encoder_alone(), igbert(), model):
        wanted = f"{silent.checkpoint.name} writes no sequences; use ProGen2, or a model with a decoder such as ankh3"
        with pytest.raises(ValueError, match=wanted):
            plm.generate(silent, "MKT")
    with pytest.raises(TypeError, match=r"plm\.load\('ankh-base'\)"):
        plm.generate("ankh-base", "MKT")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "prompts", [[5], 5, torch.tensor([7, 8, 1]), [torch.tensor(7)], [("VQL", "EVV")], [None], b"MK"]
)
def test_prompts_are_texts_or_rows_of_ids(prompts: Any) -> None:
    """A pair used to end in "invalid literal for int()"."""
    with pytest.raises(TypeError, match=r"text or a row of token ids; number 1|not iterable|must be strings"):
        plm.generate(ankh(), prompts)


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"ids \[144, -1\] are outside the vocabulary of 144 tokens"):
        plm.generate(ankh(), [[3, 144, -1]])


def test_all_bad_prompts_are_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T5, "join", lambda *_: pytest.fail("wrote before the prompts were checked"))
    wrong = {
        2: ("", "the sequence is empty"),
        3: ("MKJ", "character 'J' at position 3"),
        5: ("M_A<extra_id_0>", "gaps written in two ways"),
        6: ("M<extra_id_200>", "<extra_id_200> is not in the vocabulary"),
        7: ("mkt", "upper case"),
        8: ("M|K", "single chains"),
        9: ("MK</s>", "</s> is no residue"),
        10: ("<unk>MK", "<unk> is no residue"),
    }
    prompts = [wrong.get(i, ("MKT", ""))[0] for i in range(1, 11)]
    with pytest.raises(plm.InputError) as caught:
        plm.generate(ankh(), prompts)
    faults = {fault.record: fault for fault in caught.value.faults}
    assert faults.keys() == wrong.keys()
    for number, (prompt, reason) in wrong.items():
        assert faults[number].id == prompt[:12] and reason in faults[number].reason and faults[number].hint


def test_a_prefix_in_the_prompt_is_refused() -> None:
    """Ankh3's card writes it into the sequence; here it would come twice, and be counted as residues."""
    with pytest.raises(plm.InputError, match=r"\[S2S\] is no residue"):
        one(ankh3(), "[S2S]MKT")


def test_one_text_is_a_list_of_one_and_none_is_none() -> None:
    assert plm.generate(ankh(), "MKT", seed=1) == plm.generate(ankh(), ["MKT"], seed=1)
    assert plm.generate(ankh(), ("MKT", "AAA"), seed=1) == plm.generate(ankh(), iter(["MKT", "AAA"]), seed=1)
    assert plm.generate(ankh(), []) == []


def test_an_error_counts_a_gap_as_one_letter() -> None:
    with pytest.raises(plm.InputError, match="'J' at position 3"):
        plm.generate(ankh(), "M_J", temperature=0)


def test_settings_of_beams_need_beams() -> None:
    with pytest.raises(ValueError, match="num_beams above 1"):
        plm.generate(ankh(), "MKT", temperature=0, length_penalty=2.0)


def test_one_banned_token_may_be_given_alone() -> None:
    model = ankh()
    alone, listed = (plm.generate(model, "MKT", temperature=0, banned=given) for given in ("<unk>", ["<unk>"]))
    assert alone == listed
