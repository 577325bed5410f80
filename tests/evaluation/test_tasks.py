"""Every task of the pack on ten items; prompts, choices and metrics by hand; what stock tasks have, and written programs."""

import inspect
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval import evaluator, simple_evaluate
from lm_eval import tasks as stock_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from a3_hf.evaluation.tasks import functions as tasks
from a3_hf.evaluation.tasks.code_execution import run_program
from a3_hf.evaluation.tasks.requests import LogLikelihood, take_blank
from tests.evaluation.test_task_sources import COUNT, LOCAL, STOCK, write_all, write_items

PACK = Path(__file__).parents[2] / "a3_hf" / "evaluation" / "tasks"
ROUGE = {"rouge1", "rouge2", "rougeL"}
METRICS = {
    "hellaswag": {"acc", "acc_norm"},
    "piqa": {"acc", "acc_norm"},
    "social_iqa": {"acc"},
    "winogrande": {"acc"},
    "triviaqa": {"exact_match"},
    "nq_open": {"exact_match"},
    "webqs": {"exact_match"},
    "lambada_openai": {"acc", "perplexity"},
    "a3_hellaswag": {"acc"},
    "a3_piqa": {"acc"},
    "a3_siqa": {"acc"},
    "a3_winogrande": {"acc"},
    "a3_winogrande_infill": {"acc"},
    "a3_triviaqa": {"alias_match"},
    "rocstories_infill_3": ROUGE,
    "rocstories_infill_3_auto": ROUGE,
    "rocstories_infill_2to4": ROUGE,
    "rocstories_infill_2to4_auto": ROUGE,
    "humaneval_infill": {"exact_match"},
    "humaneval_infill_pass": {"pass@1"},
    "rocstories_infill_3_as_published_ar_prefix_only_char_length": ROUGE,
    "triviaqa_as_published_squad": {"alias_match"},
}
STOCK_YAML = {name: STOCK[name] for name in METRICS if name in STOCK and name != "humaneval_infill"}


class KnowsTheText(LM):
    """Writes the true text where a request carries it, and finds one word less likely than the last. Any model of lm-eval
    that takes blanks may stand in its place.
    """

    def __init__(self):
        super().__init__()
        self.asked: list[Instance] = []

    def loglikelihood(self, requests):
        self.asked += requests
        answers = []
        for request in requests:
            context, continuation, *more = request.args
            assert isinstance(context, str) and not context.endswith(" ")
            assert continuation.strip()
            assert continuation.startswith(" ") == (context[-1:] not in ("", '"'))
            for extra in more:
                assert list(extra) == ["suffix"] and extra["suffix"][:1] in (" ", "'")
            words = continuation.split()
            answers.append(LogLikelihood(-sum(1 / place for place in range(1, len(words) + 1)), False, len(words)))
        return answers

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError("no task of the pack asks for it")

    def generate_until(self, requests):
        self.asked += requests
        texts = []
        for request in requests:
            context, gen_kwargs = request.args
            rest, blank = take_blank(gen_kwargs)
            assert context and not context.endswith(" ") and not rest["do_sample"]
            assert set(rest) <= {"until", "do_sample", "temperature", "max_gen_toks"}
            if blank is None:
                texts.append(" Tom" * rest.get("max_gen_toks", 1))
            else:
                texts.append(blank.length_of or " They ate it")
                assert not blank.suffix or blank.suffix[0] in " \n"
        return texts


def manager(data_dir: Path, **metadata) -> TaskManager:
    return TaskManager(include_defaults=False, include_path=str(PACK), metadata={"data_dir": str(data_dir), **metadata})


def evaluate(model: LM, names: list[str], data_dir: Path, *, metadata: dict | None = None, **more) -> dict:
    return simple_evaluate(
        model=model,
        tasks=names,
        task_manager=manager(data_dir, **(metadata or {})),
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        **more,
    )


def requests_of(name: str, data_dir: Path, **metadata) -> list[list[tuple]]:
    """What a task asks a model for, item by item."""
    task = manager(data_dir, **metadata).load([name])["tasks"][name]
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    items: dict[int, list[tuple]] = {}
    for request in task.instances:
        items.setdefault(request.doc_id, []).append(request.args)
    return list(items.values())


@pytest.fixture(scope="module", autouse=True)
def _no_survey_of_the_machine():
    """lm-eval puts hardware and packages into its results, which takes it a second a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda _: None)
        yield


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("ten"))


@pytest.fixture(scope="module")
def as_people_write(tmp_path_factory) -> Path:
    """One item of each of six data sets, with what real files have: columns that no task uses, double spaces, quotes,
    spaces at ends.
    """
    folder = tmp_path_factory.mktemp("as_people_write")
    for name, row in WRITTEN.items():
        write_items(folder, name, [row])
    return folder


@pytest.fixture(scope="module")
def results(ten) -> dict:
    return evaluate(KnowsTheText(), list(METRICS), ten)


# Every task


def test_the_pack_holds_these_tasks_and_its_readme_names_them(tmp_path):
    pack = manager(tmp_path)
    assert sorted(METRICS) == pack.all_subtasks
    assert pack.all_groups == ["rocstories_infill"] and pack.all_tags == ["a3_paper"]
    readme = (PACK / "README.md").read_text()
    for name in METRICS:
        assert f"| `{name}` |" in readme, f"README of the pack lacks {name}"


@pytest.mark.parametrize("name", METRICS)
def test_a_task_on_ten_items(name, results):
    found = {key.split(",")[0] for key in results["results"][name] if "," in key and "_stderr" not in key}
    assert found == METRICS[name]
    assert results["n-samples"][name] == {"original": COUNT, "effective": COUNT}
    assert set(results["higher_is_better"][name]) == METRICS[name]
    assert isinstance(results["versions"][name], float)


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("rocstories_infill_3", "rouge2", 100.0),
        ("rocstories_infill_2to4", "rougeL", 100.0),
        ("rocstories_infill_3_auto", "rouge1", 100 * 2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4)),  # They ate it (all)
        ("rocstories_infill_3_as_published_ar_prefix_only_char_length", "rouge1", 0.0),
        ("a3_triviaqa", "alias_match", 1.0),
        ("triviaqa_as_published_squad", "alias_match", 1.0),
        ("humaneval_infill", "exact_match", 1.0),
        ("humaneval_infill_pass", "pass@1", 1.0),
        ("nq_open", "exact_match", 1.0),
        ("a3_hellaswag", "acc", 0.3),  # the longest ending has the best mean, and is gold in items 1, 5 and 9
    ],
)
def test_what_a_model_that_knows_the_text_gets(name, metric, value, results):
    (key,) = [key for key in results["results"][name] if key.split(",")[0] == metric]
    assert results["results"][name][key] == pytest.approx(value)


def test_the_groups_tasks_are_those_of_its_name(ten):
    loaded = manager(ten).load(["rocstories_infill"])
    assert sorted(loaded["tasks"]) == sorted(
        name for name in METRICS if name.startswith("rocstories") and "published" not in name
    )
    paper = manager(ten).load(["a3_paper"])["tasks"]
    assert sorted(paper) == [
        "a3_hellaswag",
        "a3_piqa",
        "a3_siqa",
        "a3_triviaqa",
        "a3_winogrande",
        "rocstories_infill_3",
    ]


def test_a_second_run_is_answered_by_the_cache(ten, tmp_path):
    names = ["hellaswag", "a3_hellaswag", "a3_winogrande_infill", "a3_triviaqa", "rocstories_infill_3", "triviaqa"]
    names += ["rocstories_infill_3_auto", "rocstories_infill_3_as_published_ar_prefix_only_char_length"]
    scores = []
    for expects_work in (True, False):
        model = KnowsTheText()
        scores.append(evaluate(model, names, ten, use_cache=str(tmp_path / "cache"))["results"])
        assert bool(model.asked) == expects_work
    assert scores[0] == scores[1]


# Stock tasks


@pytest.mark.parametrize("name", STOCK_YAML)
def test_a_stock_task_differs_from_lm_evals_only_in_where_its_items_come_from(name):
    where = {"tag", "custom_dataset", "dataset_path", "dataset_name", "training_split", "fewshot_split"}
    stock = load_yaml(Path(stock_tasks.__file__).parent / STOCK_YAML[name])
    ours = load_yaml(PACK / "stock" / f"{name}.yaml")

    def comparable(config: dict) -> dict:
        # functions of lm-eval's own files are loaded once for each way to name them
        return {
            key: inspect.getsource(value) if callable(value) else value
            for key, value in config.items()
            if key not in where
        }

    assert comparable(ours) == comparable(stock)
    assert "tag" not in ours, "a tag here would take the place of lm-eval's, with this task alone"
    assert ours["custom_dataset"].__module__ == "a3_hf.evaluation.tasks.datasets"


# Multiple choice


def test_winogrande_scores_the_option_and_what_follows_given_what_stands_before(ten):
    near, of, quoted = requests_of("a3_winogrande", ten)[:3]
    assert near == [("Ann saw Sue since", " Ann was near."), ("Ann saw Sue since", " Sue 0 was near.")]
    assert of == [("", "Ann's dog ran home to Ann."), ("", "Sue 1's dog ran home to Ann.")]
    assert quoted == [('He said "', 'Ann is here" to all.'), ('He said "', 'Sue 2 is here" to all.')]


def test_winogrande_as_an_infill_scores_the_option_alone_given_both_sides(ten):
    near, of, quoted = requests_of("a3_winogrande_infill", ten)[:3]
    behind = {"suffix": " was near."}
    assert near == [("Ann saw Sue since", " Ann", behind), ("Ann saw Sue since", " Sue 0", behind)]
    assert of[1] == ("", "Sue 1", {"suffix": "'s dog ran home to Ann."})
    assert quoted[0] == ('He said "', "Ann", {"suffix": ' is here" to all.'})


def test_the_mean_per_token_decides_not_the_sum():
    doc = {"gold": 1}
    short, long = LogLikelihood(-4.0, False, 2), LogLikelihood(-6.0, False, 6)
    assert tasks.mean_per_token(doc, [short, long]) == {"acc": 1.0}
    assert tasks.mean_per_token({"gold": 0}, [short, long]) == {"acc": 0.0}
    assert tasks.mean_per_token({"gold": 0}, [short, LogLikelihood(-2.0, True, 1)]) == {"acc": 1.0}, (
        "the first of equals"
    )


class SurpriseAt(KnowsTheText):
    """Every word costs 2 nats, but for a word that costs its own."""

    def __init__(self, costs: dict[str, float]):
        super().__init__()
        self.costs = costs

    def loglikelihood(self, requests):
        words = [request.args[1].split() for request in requests]
        return [LogLikelihood(-sum(self.costs.get(word, 2.0) for word in one), False, len(one)) for one in words]


@pytest.mark.parametrize(("cost", "right"), [(0.5, 1), (3.0, 0)])
def test_a_choice_that_is_a_prefix_of_another(cost, right, tmp_path):
    """The sum always finds the shorter one likelier; the mean finds the longer one likelier if its last word is."""
    endings = ["runs home", "runs home again", "sleeps tight tonight", "flies off away"]
    row = {**LOCAL["hellaswag"][0], "endings": endings, "label": right}
    write_items(tmp_path, "hellaswag", [row])
    model = SurpriseAt({"again": cost, "sleeps": 9.0, "flies": 9.0})
    scores = evaluate(model, ["a3_hellaswag", "hellaswag"], tmp_path)["results"]
    assert scores["a3_hellaswag"]["acc,none"] == 1.0
    assert scores["hellaswag"]["acc,none"] == float(right == 0)


def test_a_model_that_does_not_count_its_tokens_is_told_which_do(ten):
    class Plain(KnowsTheText):
        def loglikelihood(self, requests):
            return [tuple(answer) for answer in super().loglikelihood(requests)]

    with pytest.raises(ValueError, match="`--model a3`, or `--model a3_ar`"):
        evaluate(Plain(), ["a3_piqa"], ten)


# Answers


@pytest.mark.parametrize(
    ("aliases", "written", "hit"),
    [
        (["The U.S.A."], " usa, I think", 1.0),
        (["Horse", "Equus"], "It is an EQUUS!", 1.0),
        (["Sinclair Lewis"], "Lewis Sinclair", 0.0),
        (["Onion"], "onions", 1.0),  # a substring, not a word
        ([".", "the", "apple"], "pear", 0.0),  # of two of them nothing is left
        (["apple"], "", 0.0),
    ],
)
def test_alias_match(aliases, written, hit):
    assert tasks.alias_match({"aliases": aliases}, [written]) == {"alias_match": hit}


def test_triviaqa_asks_for_as_many_tokens_as_the_longest_alias_has(ten):
    ((context, settings),) = requests_of("a3_triviaqa", ten)[3]
    assert context == "Question: Which fruit has number 3?\nAnswer:"
    assert settings["blank"] == {"suffix": "", "length_of": " The apple number 3"} and settings["until"] == []


@pytest.mark.parametrize(("asked", "question"), [("Who", "Who?"), ("Who?", "Who?"), ("Who ??", "Who?")])
def test_a_question_ends_in_one_question_mark(asked, question, tmp_path):
    write_items(tmp_path, "triviaqa", [{"context": f"Question: {asked}\nAnswer:", "answer": "I", "aliases": ["I"]}])
    assert requests_of("a3_triviaqa", tmp_path)[0][0][0] == f"Question: {question}\nAnswer:"


def test_the_first_items_are_those_of_the_paper(tmp_path):
    write_items(tmp_path, "triviaqa", LOCAL["triviaqa"] * 201)
    write_items(tmp_path, "rocstories", LOCAL["rocstories"] * 101)
    assert len(requests_of("a3_triviaqa", tmp_path)) == 2000
    assert len(requests_of("rocstories_infill_3", tmp_path)) == 1000


def test_the_squad_of_the_published_script(ten):
    ((context, settings),) = requests_of("triviaqa_as_published_squad", ten)[2]
    assert context == "Tom was born in 1902.\nQuesionWhen was Tom born??\nAnswer:"
    assert settings["blank"] == {"suffix": "", "length_of": " in 1902"}


# Blanks in texts


def test_a_story_is_given_on_both_sides_of_its_blank(ten):
    ((before, settings),) = requests_of("rocstories_infill_3", ten)[1]
    assert before == "Tom saw 1 cats. He fed them."
    assert settings["blank"] == {"suffix": " Then they slept. He was sad.", "length_of": " They ate it all."}
    ((before, settings),) = requests_of("rocstories_infill_2to4", ten)[1]
    assert before == "Tom saw 1 cats."
    target = " He fed them. They ate it all. Then they slept."
    assert settings["blank"] == {"suffix": " He was sad.", "length_of": target}


def test_lengths_that_the_model_chooses_from(ten):
    def lengths(name: str, **metadata):
        return requests_of(name, ten, **metadata)[0][0][1]["blank"].get("lengths")

    assert lengths("rocstories_infill_3_auto") == [4, 48] and lengths("rocstories_infill_2to4_auto") == [12, 120]
    assert lengths("rocstories_infill_3_auto", lengths=[2, 5]) == [2, 5]
    assert lengths("rocstories_infill_3", lengths=[2, 5]) is None, "at its true length it has nothing to choose"


@pytest.mark.parametrize("lengths", [[0, 4], [5, 4], [4], "4..48", 4, [1.0, 2.0], [True, 2]])
def test_lengths_that_are_no_range(lengths, ten):
    with pytest.raises(ValueError, match="of rocstories_infill_3_auto: expected .least, most. tokens"):
        requests_of("rocstories_infill_3_auto", ten, lengths=lengths)


def test_the_published_baseline_sees_no_suffix_and_counts_characters(ten):
    ((before, settings),) = requests_of("rocstories_infill_3_as_published_ar_prefix_only_char_length", ten)[1]
    assert before == "Tom saw 1 cats. He fed them."
    assert settings == {"until": [], "do_sample": False, "max_gen_toks": len("They ate it all.")}


def test_rouge_by_hand():
    doc = {"target": " The cat sat on the mat."}
    # of 6 words and 5: the, cat, on, mat; of 5 pairs and 4: the cat; in order: the, cat, on, mat
    expected = {"rouge1": 800 / 11, "rouge2": 200 / 9, "rougeL": 800 / 11}
    assert tasks.rouge(doc, ["the cat on a mat"]) == pytest.approx(expected)
    assert tasks.rouge(doc, [""]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert tasks.rouge({"target": "dogs"}, ["dog"])["rouge1"] == 0, "words are not stemmed"


def infill_task(name: str, **changes):
    config = load_yaml(next(PACK.rglob(f"{name}.yaml")))
    return tasks.InfillTask(config={**config, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "rocstories_infill_3",
            {"lengths": [1, 2]},
            "expected exactly one of doc_to_length_of, lengths, doc_to_max_gen_toks",
        ),
        ("a3_winogrande_infill", {"lengths": [1, 2]}, "expected doc_to_suffix with output_type: multiple_choice"),
        ("rocstories_infill_3", {"output_type": "loglikelihood"}, "expected multiple_choice or generate_until"),
        (
            "rocstories_infill_3_as_published_ar_prefix_only_char_length",
            {"doc_to_suffix": "suffix"},
            "a plain continuation has no suffix",
        ),
    ],
)
def test_keys_that_do_not_go_together(name, changes, message):
    with pytest.raises(ValueError, match=message):
        infill_task(name, **changes)


def test_a_chat_template_is_refused_where_text_follows(ten):
    task = infill_task("rocstories_infill_3", metadata={"data_dir": str(ten)})
    settings = {"metadata": ("rocstories_infill_3", 0, 1), "apply_chat_template": True, "chat_template": str}
    with pytest.raises(ValueError, match="Leave out --apply_chat_template"):
        task.construct_requests(task.task_docs[0], "context", **settings)
    task = infill_task("a3_triviaqa", metadata={"data_dir": str(ten)})
    assert task.construct_requests(task.task_docs[0], "context", **settings).args[0] == "context"


def test_the_record_of_a_run_holds_the_tasks_own_keys(results):
    assert results["configs"]["rocstories_infill_3_auto"]["lengths"] == [4, 48]
    assert results["configs"]["rocstories_infill_3"]["doc_to_length_of"] == "target"


# Code


def test_a_missing_line_of_code(ten, tmp_path):
    ((before, settings),) = requests_of("humaneval_infill", ten)[4]
    assert before == "def add_4(x):\n"
    assert settings["blank"] == {"suffix": "\n    return y\n", "length_of": "    y = x + 4"}
    cut = {**LOCAL["humaneval_infill"][4], "prompt": "def add_4(x):\n    ", "canonical_solution": "y = x + 4"}
    write_items(tmp_path, "humaneval_infill", [cut])
    assert requests_of("humaneval_infill", tmp_path)[0] == [(before, settings)], "the spaces belong to what is written"


def test_exact_match_leaves_spaces_out_of_account():
    assert tasks.exact_match({"target": "    y = x"}, [" y = x\n"]) == {"exact_match": 1.0}
    assert tasks.exact_match({"target": "    y = x"}, ["y = x + 1"]) == {"exact_match": 0.0}


def test_passes_tests():
    doc = {
        "query": "def one():\n",
        "suffix": "\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    }
    assert tasks.passes_tests(doc, ["    return 1"]) == {"pass@1": 1.0}
    assert tasks.passes_tests(doc, ["    return 2"]) == {"pass@1": 0.0}
    assert tasks.passes_tests(doc, ["    exit(0)"]) == {"pass@1": 0.0}
    assert tasks.passes_tests(doc, ['    return """']) == {"pass@1": 0.0}


def test_written_code_is_not_run_unless_it_is_confirmed(ten, monkeypatch):
    monkeypatch.setattr(tasks, "run_program", lambda *_: pytest.fail("it was run"))
    with pytest.raises(ValueError, match="humaneval_infill_pass which is marked as unsafe"):
        simple_evaluate(
            model=KnowsTheText(), tasks=["humaneval_infill_pass"], task_manager=manager(ten), bootstrap_iters=0
        )


@pytest.mark.parametrize(
    ("source", "passed", "exit_code"),
    [
        ("x = 1", True, 0),
        ("assert 1 == 2", False, 1),
        ("raise SystemExit(0)", False, 0),
        ("import os\nos._exit(7)", False, 7),
        ("import os\nos._exit(93)", False, 93),  # once the code that a program ends with behind its last line
        ("import os\nos._exit(0)", False, 0),
        ("exit()", False, 0),
        (
            "import os\nfor pipe in range(3, 60):\n  try: os.write(pipe, b'passed')\n  except OSError: pass\nos._exit(0)",
            False,
            0,
        ),
        ("import os\nopen(__file__, 'a').write('x')\nos._exit(0)", False, 0),
        ("import atexit, os\natexit.register(os._exit, 3)", False, 3),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(0.1,)).start()", True, 0),
        ("class A: pass\nimport pickle\nassert type(pickle.loads(pickle.dumps(A()))) is A", True, 0),
        ("if __name__ == '__main__':\n    raise ValueError", False, 1),
        ("x = (", False, 1),
        ("x = '\ud800'", False, 1),
        ("x = '\0'", False, 1),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", False, -15),
    ],
)
def test_how_a_program_ends(source, passed, exit_code):
    outcome = run_program(source)
    assert (outcome.passed, outcome.exit_code, outcome.timed_out) == (passed, exit_code, False)


def test_an_endless_loop_is_stopped_by_the_cpu_it_takes():
    outcome = run_program("while True: pass", cpu_seconds=1, wall_seconds=60.0)
    assert not outcome.passed and outcome.exit_code < 0 and not outcome.timed_out


def test_a_program_that_waits_is_stopped_by_the_clock():
    outcome = run_program("import time\ntime.sleep(600)", wall_seconds=0.5)
    assert not outcome.passed and outcome.timed_out


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
def test_too_much_memory():
    assert run_program("x = bytearray(50 * 2**20)", memory_megabytes=500).passed
    assert run_program("x = bytearray(900 * 2**20)", memory_megabytes=500).exit_code == 1


def test_a_file_that_is_too_large():
    assert not run_program("open('x', 'wb').write(bytes(2**21))").passed


def test_a_program_starts_with_nothing(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    source = """
import os, sys
assert "A_SECRET" not in os.environ
assert os.listdir() == ["program.py"]
assert sys.stdin.read() == "" and sys.flags.isolated
print("x" * 10**6)
"""
    assert run_program(source).passed


def test_what_a_program_leaves_behind_is_ended(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(1); open({str(mark)!r}, 'w')"
    assert run_program(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])").passed
    assert run_program("import time\ntime.sleep(1.5)").passed
    assert not mark.exists()


@pytest.mark.parametrize("limit", ["cpu_seconds", "wall_seconds", "memory_megabytes"])
def test_a_limit_of_nothing(limit):
    with pytest.raises(ValueError, match=f"{limit}=0: expected a number above 0"):
        run_program("", **{limit: 0})


# Items as people write them

PAINT = "Painting a fence: A man stands at a fence. he"
FENCES = [
    " dips a brush into the paint.",
    " rides a fence to school.",
    " isn't holding a cat's tail.",
    ' says "blue" and eats a roof.',
]
SHED = "How do I dry a wet shed before it's winter?"
DRYING = [f" Open the shed's doors for a day, and hang {what}in it." for what in ("towels ", "a fish ")]
ALEX = "Alex didn't lend Kim the bike. What does Alex want to do next?"
PLANS = [" sell it", " Ride it to Kim's", " walk home"]
OLGA = "Olga was a far better cook than Petra so"
RIVER = "Question: Ebb, flow and slack are states of what{}\nAnswer:"
STORY = [
    "Ed's boat leaked. He had no money, and borrowed some.",
    " It wasn't long before he could sail.",
    " The wind took him far. He came back brown.",
]
WRITTEN = {
    "hellaswag": {
        "ind": 24,
        "activity_label": "Painting a fence",
        "ctx": "A man stands at a fence. he",
        "endings": [ending[1:].replace("the paint", "the  paint") for ending in FENCES],  # stock takes the space out
        "label": 0,
    },
    "piqa": {"goal": SHED, "sol1": DRYING[0][1:], "sol2": DRYING[1][1:], "label": 0},
    "social_iqa": {
        "context": "Alex didn't lend Kim the bike.",
        "question": "What does Alex want to do next?",
        **{f"answer{letter}": plan[1:] for letter, plan in zip("ABC", PLANS, strict=True)},
        "label": "3",
    },
    "winogrande": {
        "sentence": f"{OLGA} _ ate at home.",
        "option1": "Olga",
        "option2": "Petra",
        "answer": "1",
    },
    "triviaqa": {
        "context": RIVER.format("?"),
        "answer": "Tide",
        "aliases": ["Tides", "The tide", "Tide", "Neap-tide range", "High  water"],
    },
    "rocstories": {
        "InputStoryid": "138d",
        "InputSentence1": "Ed's boat leaked.",
        "InputSentence2": "He had no money, and borrowed some.",
        "InputSentence3": "It wasn't long before he could sail.",
        "InputSentence4": "The wind took him far.",
        "RandomFifthSentenceQuiz1": "He came back brown.",
        "RandomFifthSentenceQuiz2": "He sold a horse.",
        "AnswerRightEnding": "1",
    },
}


@pytest.mark.parametrize(
    ("name", "asked", "gold"),
    [
        ("hellaswag", [(PAINT, ending) for ending in FENCES], 0),
        ("a3_hellaswag", [(PAINT, ending) for ending in FENCES], 0),
        ("piqa", [(f"Question: {SHED}\nAnswer:", solution) for solution in DRYING], 0),
        ("a3_piqa", [(f"Question: {SHED}\nAnswer:", solution) for solution in DRYING], 0),
        ("social_iqa", [(f"Q: {ALEX}\nA:", plan) for plan in PLANS], 2),
        ("a3_siqa", [(f"Question: {ALEX}\nAnswer:", plan) for plan in PLANS], 2),
        ("winogrande", [(f"{OLGA} {name}", " ate at home.") for name in ("Olga", "Petra")], 0),
        ("a3_winogrande", [(OLGA, f" {name} ate at home.") for name in ("Olga", "Petra")], 0),
    ],
)
def test_the_prompts_of_an_item_as_people_write(name, asked, gold, as_people_write):
    assert requests_of(name, as_people_write)[0] == asked
    task = manager(as_people_write).load([name])["tasks"][name]
    # the stock task of WinoGrande has what is scored for its target, and the gold choice for its text
    assert int((task.doc_to_text if name == "winogrande" else task.doc_to_target)(task.task_docs[0])) == gold


def test_the_question_and_story_as_people_write(as_people_write):
    ((context, _),) = requests_of("triviaqa", as_people_write)[0]
    assert context == RIVER.format("??")
    ((context, settings),) = requests_of("a3_triviaqa", as_people_write)[0]
    assert context == RIVER.format("?") and settings["blank"]["length_of"] == " Neap-tide range"
    ((before, settings),) = requests_of("rocstories_infill_3", as_people_write)[0]
    assert [before, settings["blank"]["length_of"], settings["blank"]["suffix"]] == STORY
