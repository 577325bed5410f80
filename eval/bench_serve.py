"""Loads a server as strangers do: mixed requests, some clients that leave, each answer compared with what it is alone.

    a3 serve adapters/smollm2-135m --port 8000 &
    python eval/bench_serve.py --port 8000 --requests 2000 --concurrency 8 32

First every request is sent alone; these answers are what later ones must equal. A server in half or single precision rounds by
the number of rows that it decodes together, so that now and then a token changes: such answers are counted apart, if up to the
first token that differs, and in the distribution that it was drawn from, they are the same to --nats.
"""

import argparse
import asyncio
import json
import platform
import random
import time
from datetime import date
from pathlib import Path

import httpx

from a3_hf.evaluation.reporting.markdown import markdown_table

OPENINGS = (
    "One day, a little girl named Lily found a needle in her room.",
    "Tom and his dog went to the park to play.",
    "Once upon a time there was a big red boat.",
    "Anna was sad because it rained all day.",
    "The old man had a secret that nobody knew.",
)
ENDINGS = (" They were happy.", " The end.", " Then she went home.", " It was a good day.")


KINDS = list(range(5))


def request_of(number: int) -> dict:
    """The request of a number: continuations and blanks of many lengths, by all kinds of strategies."""
    draw = random.Random(number)
    body = {
        "prompt": " ".join(draw.sample(OPENINGS, draw.randint(1, 2))),
        "seed": number,
        "logprobs": 2,
        "commits": True,
    }
    body |= {"temperature": draw.choice([0, 0.8]), "max_tokens": draw.randint(4, 36)}
    kind = draw.choice(KINDS)
    if kind:
        body["suffix"] = draw.choice(ENDINGS)
    if kind == 2:
        body |= {"strategy": "groupwise", "group_size": 4}
    elif kind == 3:
        body |= {"strategy": "dynamic", "tokens_per_step": 2}
    elif kind == 4:
        body |= {"order": "random"}
    return body


class Load:
    """Sends requests to a server and keeps what came back."""

    def __init__(self, url: str, key: str | None):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits)
        self.seconds: list[float] = []
        self.statuses: dict[int, int] = {}
        self.tokens = 0

    async def send(self, number: int, *, leaves: bool = False) -> dict | None:
        """Returns the first choice; None for a client that leaves while it is answered."""
        body = request_of(number)
        if leaves:
            try:
                async with self.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                    async for _ in stream.aiter_lines():
                        break
            except httpx.HTTPError:
                pass
            return None
        start = time.perf_counter()
        while True:
            response = await self.client.post("/v1/completions", json=body)
            self.statuses[response.status_code] = self.statuses.get(response.status_code, 0) + 1
            if response.status_code != 429:
                break
            await asyncio.sleep(float(response.headers["retry-after"]))
        self.seconds.append(time.perf_counter() - start)
        if response.status_code != 200:
            return {"text": f"status {response.status_code}", "commits": []}
        self.tokens += response.json()["usage"]["completion_tokens"]
        return response.json()["choices"][0]

    async def run(self, numbers: range, concurrency: int, leaving: float) -> dict[int, dict]:
        """Sends all requests, `concurrency` at a time."""
        waiting, found = iter(numbers), {}

        async def client() -> None:
            for number in waiting:
                leaves = random.Random(f"leaves {number}").random() < leaving
                answer = await self.send(number, leaves=leaves)
                if answer is not None:
                    found[number] = answer

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return found


def by_rounding(number: int, found: dict, alone: dict, nats: float) -> bool:
    """Whether two answers are the same up to a token where the model saw the same distribution in both, to `nats`. Then they
    part by rounding: of two scores, if greedy, which must be as near; of the draw's border, if sampled.
    """
    by_place = [{one["position"]: one for one in answer["commits"]} for answer in (found, alone)]
    steps = [sorted(commits, key=lambda place: (commits[place]["step"], place)) for commits in by_place]
    for mine, theirs in zip(*steps, strict=False):
        ones = by_place[0][mine], by_place[1][theirs]
        if mine == theirs and ones[0]["token_id"] == ones[1]["token_id"]:
            if abs(ones[0]["logprob"] - ones[1]["logprob"]) > nats:
                return False
            continue
        if mine != theirs:  # two blanks whose confidence is nearly equal
            return abs(ones[0]["logprob"] - ones[1]["logprob"]) < nats
        if request_of(number)["temperature"] == 0:
            return abs(ones[0]["logprob"] - ones[1]["logprob"]) < nats
        tops = [[(top["text"], top["logprob"]) for top in one["top_logprobs"]] for one in ones]
        return all(a[0] == b[0] and abs(a[1] - b[1]) < nats for a, b in zip(*tops, strict=True))
    return False


def resident(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def measure(arguments: argparse.Namespace) -> list[dict]:
    url, numbers = f"http://{arguments.host}:{arguments.port}", range(arguments.requests)
    rows, alone, first_rate = [], {}, None
    if arguments.answers is not None and arguments.answers.is_file():
        stored = json.loads(arguments.answers.read_text())
        first_rate, alone = stored["rate"], {int(number): one for number, one in stored["answers"].items()}
    memory = None if arguments.pid is None else resident(arguments.pid)
    for concurrency in [*([] if alone else [1]), *arguments.concurrency]:
        load = Load(url, arguments.api_key)
        await load.send(0)  # not counted: the first one after a start
        load.seconds, load.tokens, load.statuses = [], 0, {}
        start = time.perf_counter()
        found = await load.run(numbers, concurrency, leaving=0 if concurrency == 1 else arguments.leaving)
        seconds = time.perf_counter() - start
        await load.client.aclose()
        alone = alone or found
        different = [number for number, one in found.items() if one["text"] != alone[number]["text"]]
        ties = [number for number in different if by_rounding(number, found[number], alone[number], arguments.nats)]
        rate = load.tokens / seconds
        first_rate = first_rate or rate
        if arguments.answers is not None and concurrency == 1:
            arguments.answers.write_text(json.dumps({"rate": rate, "answers": found}))
        load.seconds.sort()
        at = {
            part: load.seconds[min(int(part / 100 * len(load.seconds)), len(load.seconds) - 1)] for part in (50, 95, 99)
        }
        row = {
            "concurrency": concurrency, "answers": len(found), "left": len(numbers) - len(found),
            "wrong": len(different) - len(ties), "by rounding": len(ties),
            "5xx": sum(count for status, count in load.statuses.items() if status >= 500),
            "tokens a second": round(rate, 1), "times one at a time": round(rate / first_rate, 2),
            **{f"p{part}, s": round(value, 2) for part, value in at.items()},
            "MiB": None if arguments.pid is None else round(resident(arguments.pid)),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
        if different:
            print("different:", [number for number in different if number not in ties][:20], flush=True)
    if memory is not None:
        print(f"MiB before: {memory:.0f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    parser.add_argument("--pid", type=int, help="the server's process, whose memory is read")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--leaving", type=float, default=0.05, help="share of clients that leave early")
    parser.add_argument("--answers", type=Path, help="keeps what requests alone got, for another run; .json")
    parser.add_argument("--nats", type=float, default=0.002, help="by which rounding may change a score")
    parser.add_argument("--kinds", type=int, nargs="+", default=list(range(5)), help="0: continuations; 1: left to right, 2: "
                        "groups of 4, 3: dynamic, 4: random order, all with a suffix")  # fmt: skip
    arguments = parser.parse_args()
    KINDS[:] = arguments.kinds
    rows = asyncio.run(measure(arguments))
    print(markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    print(f"{date.today()}, {platform.machine()}")


if __name__ == "__main__":
    main()
