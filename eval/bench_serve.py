"""Loads a server as strangers do: mixed requests, some clients that leave, each answer compared with what it is alone.

    a3 serve adapters/smollm2-135m --port 8000 &
    python eval/bench_serve.py --port 8000 --requests 2000 --concurrency 8 32

First every request is sent alone; these answers are what later ones must equal. A server in half or single precision rounds
by the number of rows that it decodes together, so that now and then two tokens whose scores are nearly equal change places:
such answers are counted apart, if at the first token that differs the two scores are less than --tie apart.
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
    kind = draw.randrange(5)
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


def is_tie(found: dict, alone: dict, tie: float) -> bool:
    """Whether two answers part at a token where both saw nearly equal scores, or sampled at the border of two tokens."""
    by_place = [{one["position"]: one for one in answer["commits"]} for answer in (found, alone)]
    order = sorted(by_place[1], key=lambda place: (by_place[1][place]["step"], place))
    for place in order:
        mine, theirs = (commits.get(place) for commits in by_place)
        if mine is None or mine["step"] != theirs["step"] or mine["token_id"] != theirs["token_id"]:
            if mine is None:
                return False
            top = [one["logprob"] for one in theirs["top_logprobs"]]
            return abs(mine["logprob"] - theirs["logprob"]) < tie or top[0] - top[1] < tie
        if abs(mine["logprob"] - theirs["logprob"]) > tie:
            return False
    return True


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
        ties = [number for number in different if is_tie(found[number], alone[number], arguments.tie)]
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
            "wrong": len(different) - len(ties), "ties": len(ties),
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
    parser.add_argument("--tie", type=float, default=0.01, help="nats between two scores that rounding may swap")
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments))
    print(markdown_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    print(f"{date.today()}, {platform.machine()}")


if __name__ == "__main__":
    main()
