"""Times blanks on vLLM beside plain continuations on the same server, in groups, and beside `a3 serve`; on a CPU or a GPU.

    python eval/bench_vllm.py --vllm http://127.0.0.1:8000 --own http://127.0.0.1:8001 --concurrency 1 16 64
    python eval/bench_vllm.py --start models/smollm2-135m --canvas-length 16    # starts the servers itself

What is timed, in turns in each round, while the other servers are idle:

    infill  a blank of --length tokens between --prefix and --suffix, on --vllm
    plain   the prompt as long as both together, continued by as many tokens on --vllm: what vLLM does for a plain LLaMA
    groups  as infill, --group-size tokens a step, on --groups: a server with canvas_length in its --hf-overrides
    own     as infill, on --own: `a3 serve`

Every request has another text, so that no server finds its tokens in a cache; with --shared-prefix the texts of one way have
one prefix. All answers are streams. Tokens a second are those of whole rounds: prompts, streams and the client cost time, too.
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
import torch

from a3_hf.evaluation.reporting.markdown import markdown_table
from a3_hf.evaluation.reporting.results import environment

WORDS = (
    "the and was that with for they have this from one had not but what all were when there can your which their said will "
    "each about how many then them these some her would make like him into time has look two more write see number way could "
    "people than first water been call who its now find long down day did get come made may part over new sound take only "
    "little work know place year live back give most very after thing our just name good man think say great where help"
).split()
OPENING = 12  # words that make a request's text its own where the rest comes from a file
WARM_UP_TOKENS = 8
START_SECONDS = 900
WAYS = ("infill", "plain", "groups", "own")
RATES = ("tokens/s", "least", "most")
ON_CPU = {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
AS_A3 = {"architectures": ["A3LlamaForCausalLM"], "model_type": "a3_llama", "slot_start": "left_token"}


@dataclass(frozen=True)
class Texts:
    """The texts of requests.

    Attributes:
        prefix, suffix: words of each, or a text that all requests have there.
        shared_prefix: all requests of a way have one prefix.
    """

    prefix: int | str
    suffix: int | str
    seed: int = 0
    shared_prefix: bool = False

    def of(self, *key: Any) -> tuple[str, str]:
        """Returns the prefix and the suffix of a request. Its `key` begins with its way."""
        draw = random.Random(f"{self.seed} {key}")
        first = random.Random(f"{self.seed} {key[0]}") if self.shared_prefix else draw
        if isinstance(self.prefix, int):
            prefix = " ".join(first.choices(WORDS, k=self.prefix))
        else:
            prefix = self.prefix if self.shared_prefix else f"{' '.join(first.choices(WORDS, k=OPENING))} {self.prefix}"
        suffix = " ".join(draw.choices(WORDS, k=self.suffix)) if isinstance(self.suffix, int) else self.suffix
        return prefix, f" {suffix}"


def body_of(way: str, prefix: str, suffix: str, *, length: int, group_size: int) -> dict[str, Any]:
    """Returns the body of a request to /v1/completions."""
    body = {"max_tokens": length, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    if way == "plain":
        return body | {"prompt": prefix + suffix, "ignore_eos": True}
    body |= {"prompt": prefix, "suffix": suffix}
    return body | {"group_size": group_size} if way == "groups" else body


@dataclass
class Answer:
    """What came back for a request.

    Attributes:
        first: seconds until the first text; None: there was none.
        seconds: until the end.
        tokens, prompt_tokens: as the server counts them.
        error: why it does not count: a status, an error in the stream, fewer tokens than asked for.
    """

    first: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""


def read_stream(pieces: Sequence[tuple[float, bytes]], length: int) -> Answer:
    """Reads a stream of events.

    Args:
        pieces: seconds since the request was sent, and the bytes that came then.
    """
    answer, held = Answer(seconds=pieces[-1][0] if pieces else 0.0), b""
    for seconds, piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = f"stream: {event['error'].get('message', event['error'])}"
            if answer.first is None and any(choice.get("text") for choice in event.get("choices", ())):
                answer.first = seconds
            usage = event.get("usage") or {}
            answer.tokens = usage.get("completion_tokens", answer.tokens)
            answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
    if not answer.error and answer.tokens < length:
        answer.error = f"{answer.tokens} of {length} tokens"
    return answer


async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """Sends a request; its stream is read into the answer when it has ended, so that reading costs no other one time."""
    start, pieces = time.perf_counter(), []
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Answer(seconds=time.perf_counter() - start, error=f"{response.status_code}: {text[:200]}")
            async for piece in response.aiter_bytes():
                pieces.append((time.perf_counter() - start, piece))
    except httpx.HTTPError as error:
        return Answer(seconds=time.perf_counter() - start, error=f"{type(error).__name__}: {error}")
    return read_stream(pieces, body["max_tokens"])


async def send_all(client: httpx.AsyncClient, bodies: Sequence[dict], concurrency: int) -> tuple[list[Answer], float]:
    """Sends requests, `concurrency` at a time; returns the answers, and seconds for all."""
    waiting, found = iter(bodies), []

    async def one_client() -> None:
        for body in waiting:
            found.append(await send(client, body))

    start = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return found, time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass
class Measured:
    """Rounds of one way with one number of clients.

    Attributes:
        rates: tokens a second of each round.
    """

    rates: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def add(self, answers: Sequence[Answer], seconds: float) -> None:
        self.rates.append(sum(answer.tokens for answer in answers if not answer.error) / seconds)
        self.answers += answers


def percentile(values: Sequence[float], part: float) -> float | None:
    """Returns the smallest value that at least `part` percent of the values don't exceed; None without values."""
    return float(np.percentile(values, part, method="inverted_cdf")) if values else None


def ratio(rates: Sequence[float], others: Sequence[float] | None) -> float | None:
    """Returns the median of the rounds' ratios; None where there is nothing to compare with."""
    pairs = [one / other for one, other in zip(rates, others or (), strict=False) if other]
    return median(pairs) if pairs else None


def row_of(way: str, concurrency: int, found: dict[str, Measured]) -> dict[str, Any]:
    """Returns a row of the table: tokens a second, seconds, numbers of tokens, and errors with what they say."""
    measured = found[way]
    good = [answer for answer in measured.answers if not answer.error]
    firsts = [answer.first for answer in good if answer.first is not None]
    whole = [answer.seconds for answer in good]
    rates = {name: None if other == way or other not in found else ratio(measured.rates, found[other].rates)
             for name, other in (("of plain", "plain"), ("of own", "own"))}  # fmt: skip
    told: dict[str, list] = {}  # number and first message of each kind of error
    for error in (answer.error for answer in measured.answers if answer.error):
        told.setdefault(error.partition(":")[0], [0, error])[0] += 1
    return {
        "clients": concurrency, "way": way, "tokens/s": median(measured.rates), "least": min(measured.rates),
        "most": max(measured.rates), **rates,
        **{f"first p{part}, s": percentile(firsts, part) for part in (50, 95)},
        **{f"whole p{part}, s": percentile(whole, part) for part in (50, 95, 99)},
        "given": median(answer.prompt_tokens for answer in good) if good else None,
        "written": sum(answer.tokens for answer in good), "answers": len(good), "errors": len(measured.answers) - len(good),
        "told": told,
    }  # fmt: skip


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """One row for each way and number of clients; rates of rounds are shown as median (least–most)."""
    headings = [name for name in rows[0] if name not in ("least", "most", "told")]
    rows = [row | {"tokens/s": "{:.3g} ({:.3g}–{:.3g})".format(*(row[name] for name in RATES))} for row in rows]
    return markdown_table(headings, ([row[name] for name in headings] for row in rows))


# ---------------------------------------------------------------------------------------------------------- the servers


def versions_of(urls: dict[str, str]) -> dict[str, str]:
    """Returns the version of vLLM that each of its servers reports."""
    found = {}
    for name in ("vllm", "groups"):
        try:
            answer = httpx.get(f"{urls[name]}/version", timeout=10) if name in urls else None
        except httpx.HTTPError:
            answer = None
        if answer is not None and answer.status_code == 200 and "version" in answer.json():
            found[f"vllm of --{name}"] = answer.json()["version"]
    return found


def commands(arguments: argparse.Namespace, *, is_gpu: bool) -> dict[str, list[str]]:
    """Returns the command of each server that --start wants, without its port."""
    model, bin_folder = arguments.start, Path(sys.executable).parent
    config = json.loads(Path(model, "config.json").read_text())
    most = str(max(arguments.concurrency))
    dtype = arguments.dtype or ("bfloat16" if is_gpu else "float32")
    vllm = [
        str(bin_folder / "vllm"),
        "serve",
        model,
        "--served-model-name",
        "a3",
        "--dtype",
        dtype,
        "--max-num-seqs",
        most,
    ]
    vllm += ["--gpu-memory-utilization", str(arguments.memory)] if is_gpu else ["--enforce-eager"]
    overrides = AS_A3 if config.get("model_type") == "llama" else {}
    found = {}
    if "infill" in arguments.ways or "plain" in arguments.ways:
        found["vllm"] = [*vllm, *(["--hf-overrides", json.dumps(overrides)] if overrides else [])]
    if arguments.canvas_length and "groups" in arguments.ways:
        found["groups"] = [*vllm, "--hf-overrides", json.dumps(overrides | {"canvas_length": arguments.canvas_length})]
    found = {name: [*command, *shlex.split(arguments.vllm_options)] for name, command in found.items()}
    if "own" in arguments.ways:
        own = [str(bin_folder / "a3"), "serve", model, "--name", "a3", "--dtype", dtype, "--max-batch", most]
        found["own"] = [*own, *shlex.split(arguments.own_options)]
    return found


@contextmanager
def served(name: str, command: Sequence[str], key: str | None, *, is_gpu: bool):
    """Runs a server, and gives its URL when it answers.

    Raises:
        RuntimeError: it ended, or does not answer in time; with the end of what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"VLLM_NO_USAGE_STATS": "1", **({} if is_gpu else ON_CPU), **os.environ}
    environment |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_PLUGINS": "a3,a3_endpoints"}
    if key is not None:
        environment |= {"VLLM_API_KEY": key, "A3_API_KEY": key}
    with tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log") as log:
        command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        url, started = f"http://127.0.0.1:{port}", time.perf_counter()
        try:
            while not _answers(url):
                seconds = time.perf_counter() - started
                if process.poll() is not None or seconds > START_SECONDS:
                    raise RuntimeError(f"{name} does not answer after {seconds:.0f} s:\n{_end_of(log.name)}")
                time.sleep(0.5)
            print(f"{name}: started in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
            yield url
            if process.poll() is not None:
                print(f"{name} has ended by itself:\n{_end_of(log.name)}", file=sys.stderr)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                pass
            try:
                os.killpg(process.pid, 9)  # what it has started, too
            except ProcessLookupError:
                pass
            process.wait()


def _end_of(log: str) -> str:
    return Path(log).read_text(errors="replace")[-3000:]


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


# ------------------------------------------------------------------------------------------------------------ measuring


async def words_of(client: httpx.AsyncClient, tokens: int) -> int:
    """Returns how many words have this many tokens, as a server counts them."""
    counts = []
    for number in (20, 120):  # the difference: without what a tokenizer adds
        text = " ".join(random.Random(number).choices(WORDS, k=number))
        response = await client.post("/v1/completions", json={"prompt": text, "max_tokens": 1, "temperature": 0})
        if response.status_code != 200:
            raise RuntimeError(f"{client.base_url}: {response.status_code}: {response.text[:300]}")
        counts.append(response.json()["usage"]["prompt_tokens"])
    return max(round(tokens * 100 / (counts[1] - counts[0])), 1)


async def measure(arguments: argparse.Namespace, urls: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the rows of the table."""
    server_of = {"infill": "vllm", "plain": "vllm", "groups": "groups", "own": "own"}
    ways = [way for way in arguments.ways if server_of[way] in urls]
    if not ways:
        raise RuntimeError(f"no server for {', '.join(arguments.ways)}: give --vllm, --groups, --own or --start")
    headers = {} if arguments.api_key is None else {"Authorization": f"Bearer {arguments.api_key}"}
    options = {"headers": headers, "timeout": arguments.timeout, "limits": httpx.Limits(max_connections=None)}
    clients = {name: httpx.AsyncClient(base_url=url, **options) for name, url in urls.items()}
    first = clients[server_of[ways[0]]]
    lengths = [
        await words_of(first, one) if isinstance(one, int) else one for one in (arguments.prefix, arguments.suffix)
    ]
    texts = Texts(*lengths, seed=arguments.seed, shared_prefix=arguments.shared_prefix)

    def bodies(way: str, count: int, length: int, *key: Any) -> list[dict[str, Any]]:
        found = (texts.of(way, *key, number) for number in range(count))
        return [body_of(way, *each, length=length, group_size=arguments.group_size) for each in found]

    rows = []
    for concurrency in arguments.concurrency:
        found = {way: Measured() for way in ways}
        for way in ways:  # not counted: the first requests after a start
            short = bodies(
                way, min(concurrency, arguments.requests), min(arguments.length, WARM_UP_TOKENS), concurrency, "warm"
            )
            await send_all(clients[server_of[way]], short, concurrency)
        for number in range(arguments.rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                asked = bodies(way, arguments.requests, arguments.length, concurrency, number)
                answers, seconds = await send_all(clients[server_of[way]], asked, concurrency)
                found[way].add(answers, seconds)
                told = f"{concurrency} clients, round {number + 1}, {way}: {found[way].rates[-1]:.1f} tokens/s"
                print(told, file=sys.stderr, flush=True)
        rows += [row_of(way, concurrency, found) for way in ways]
    for client in clients.values():
        await client.aclose()
    return rows


def tokens_or_text(word: str) -> int | str:
    """A number of tokens, or the text of a file."""
    if word.isdigit() and int(word) > 0:
        return int(word)
    try:
        return Path(word).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{word!r}: expected a number of tokens, at least 1, or a text file ({error})"
        ) from None


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="URL of `vllm serve` with the plugin, one token a step")
    parser.add_argument("--groups", help="URL of one that writes groups")
    parser.add_argument("--own", help="URL of `a3 serve`")
    parser.add_argument(
        "--start", metavar="MODEL", help="starts the servers that no URL is given for, with this folder"
    )
    parser.add_argument("--canvas-length", type=int, help="with --start: starts a server that writes groups, too")
    parser.add_argument("--dtype", help="with --start; default: bfloat16 on a GPU, else float32")
    parser.add_argument("--memory", type=float, default=0.25, help="with --start: share of the GPU for each vLLM")
    parser.add_argument("--vllm-options", default="", help="with --start: further options of `vllm serve`, as one word")
    parser.add_argument("--own-options", default="", help="with --start: further options of `a3 serve`")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--api-key", help="of all servers")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=128, help="in each round, of each way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=64, help="tokens to write")
    parser.add_argument("--prefix", type=tokens_or_text, default=256, help="tokens, or a text file")
    parser.add_argument("--suffix", type=tokens_or_text, default=64, help="tokens, or a text file")
    parser.add_argument("--shared-prefix", action="store_true", help="all requests of a way have one prefix")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the texts; another one for a second run on the same server"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a server may be silent")
    parser.add_argument("--device", help="shown under the table; default: this machine's")
    parser.add_argument("--output", type=Path, help="writes the rows; .json")
    arguments = parser.parse_args(words)
    for name in ("requests", "rounds", "length", "group_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    if min(arguments.concurrency) < 1:
        parser.error("--concurrency: expected at least 1")
    return arguments


def main() -> int:
    arguments = parse()
    is_gpu = torch.cuda.is_available()
    urls = {name: getattr(arguments, name) for name in ("vllm", "groups", "own") if getattr(arguments, name)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # which ends the servers, too
    with ExitStack() as stack:
        try:  # inside the servers' context, so that one that ends by itself is told of
            for name, command in commands(arguments, is_gpu=is_gpu).items() if arguments.start else ():
                if name not in urls:  # one after the other: vLLM measures what memory is free
                    urls[name] = stack.enter_context(served(name, command, arguments.api_key, is_gpu=is_gpu))
            rows = asyncio.run(measure(arguments, urls))
        except (OSError, RuntimeError, httpx.HTTPError) as error:
            print(error or type(error).__name__, file=sys.stderr)
            return 2
        about = environment("cuda" if is_gpu else "cpu")
        about["versions"] |= versions_of(urls)
    about["device"] = arguments.device or about["device"]
    print(table_of(rows))
    for row in rows:
        for count, error in row["told"].values():
            print(f"{row['clients']} clients, {row['way']}: {count} × {error}")
    kind = "; one prefix for all requests of a way" if arguments.shared_prefix else ""
    print(f"{arguments.rounds} rounds of {arguments.requests} requests, {arguments.length} tokens each{kind}")
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    print(f"{about['device']}; {versions}; {about['date']}")
    if arguments.output:
        arguments.output.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    return int(any(row["errors"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
