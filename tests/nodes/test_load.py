"""A server under load: many prompts, cancels and trainings among them; several clients; and one that is killed."""

import asyncio
import json
import random
import statistics
import struct
import time
from collections.abc import Mapping
from typing import Any

import graphs
import pytest
from graphs import MODEL, Graph, node
from servers import Server

pytestmark = pytest.mark.trust("load")

KINDS = {"stock": 40, "applied": 25, "learning": 20, "wrong": 8, "training": 7}  # how often of 100
STOCK = ("euler", "heun", "dpmpp_2m", "ipndm", "uni_pc", "euler_ancestral")
WAVE = 5  # prompts that wait at once
WRONG = "AMED Apply Predictor"  # what the only error says that is asked for
FLAT = 1.02
TEXT = 3  # ComfyUI's number of messages that are a text for a node


def graph_of(kind: str, chance: random.Random) -> Graph:
    """A graph of a kind, with a seed of its own, so that nothing is cached."""
    graph, seed = graphs.demo(digit=str(chance.randrange(10)), batch=2), chance.randrange(2**32)
    sampler, scheduler, steps, model = chance.choice(STOCK), "karras", chance.randint(3, 8), MODEL
    if kind == "training":
        return graph | {"train": graphs.train(effort="quick", seed=seed, save_as="load")}
    if kind == "wrong":
        sampler = "amed_ipndm"  # which needs a predictor
    if kind == "learning":
        sampler, scheduler, steps = "amed", "amed", chance.randint(3, 6)
    if kind == "applied":
        graph |= {"load": node("AMEDLoadPredictor", predictor_name="digits_amed_multistep_5.safetensors")}
        graph |= {"apply": graphs.apply(["load", 0])}
        model, sampler, scheduler, steps = ["apply", 0], "amed", "amed", 5
    graph |= {"sample": graphs.k_sampler(model, sampler, scheduler, steps, seed=seed)}
    return graph | graphs.save_image(["sample", 0], kind)


def cancel(server: Server, prompt_id: str, chance: random.Random) -> None:
    """Cancel a prompt at some moment while it runs, if it is not done before."""
    while prompt_id not in [item[1] for item in server.get("/queue")["queue_running"]]:
        if server.get(f"/history/{prompt_id}"):
            return
        time.sleep(0.01)
    time.sleep(chance.random() * 0.5)
    server.post("/interrupt", {"prompt_id": prompt_id})


def outcome(history: dict[str, Any]) -> str:
    """success, error or interrupted."""
    said = dict(history["status"]["messages"])
    (end,) = {"execution_success", "execution_error", "execution_interrupted"} & set(said)
    assert end != "execution_error" or WRONG in said[end]["exception_message"], said[end]
    return str(end.removeprefix("execution_"))


def test_many_prompts_with_cancels_and_trainings(server: Server, trials: Any) -> None:
    """Every prompt ends as it should, the log holds no other error, and the server's memory is flat."""
    import psutil  # noqa: PLC0415 - comes with ComfyUI

    chance, process = random.Random(0), psutil.Process(server.process.pid)
    before, begun, memory, count = len(server.log()), time.monotonic(), [], trials.many(20, 500)
    kinds = chance.choices(list(KINDS), list(KINDS.values()), k=count)
    assert set(kinds) == set(KINDS)
    ends: dict[str, int] = {}
    for start in range(0, count, WAVE):
        wave = [(kind, chance.random() < 0.2) for kind in kinds[start : start + WAVE]]
        queued = [(server.queue(graph_of(kind, chance)), kind, cancelled) for kind, cancelled in wave]
        for prompt_id, _, cancelled in queued:
            if cancelled:
                cancel(server, prompt_id, chance)
        for prompt_id, kind, cancelled in queued:
            end = outcome(server.wait(prompt_id))
            expected = "error" if kind == "wrong" else "success"
            well = end == expected or (cancelled and end == "interrupted")
            trials.held(f"{kind} {prompt_id}", well, f"{end} instead of {expected}, cancelled: {cancelled}")
            ends[f"{kind} {end}"] = ends.get(f"{kind} {end}", 0) + 1
            memory.append(process.memory_info().rss / 2**20)
    left = server.get("/queue")
    trials.held("the queue is empty", not left["queue_running"] and not left["queue_pending"], str(left))
    log = server.log()[before:].splitlines()
    other = [line for line in log if "!!! Exception" in line and WRONG not in line]
    other += [line for line in log if "AMED:" in line and ("failed" in line or "Error" in line)]
    trials.held("no other error in the log", not other, "\n".join(other))
    part = count // 5
    first, last = (statistics.mean(part_of) for part_of in (memory[part : 2 * part], memory[-part:]))
    trials.held("memory", last < first * (FLAT if trials.full else 1.25), f"{first:.1f} MB grew to {last:.1f} MB")
    print(f"{count} prompts in {time.monotonic() - begun:.0f} s: {ends}; {first:.1f} MB, then {last:.1f} MB")


def renamed(graph: Graph, prefix: str) -> Graph:
    """The same graph with other ids of its nodes."""
    links = {name: f"{prefix}{name}" for name in graph}

    def moved(value: Any) -> Any:
        return [links[value[0]], *value[1:]] if isinstance(value, list) else value

    return {
        links[name]: one | {"inputs": {key: moved(value) for key, value in one["inputs"].items()}}
        for name, one in graph.items()
    }


async def heard(server: Server, clients: Mapping[str, str]) -> dict[str, Any]:
    """Of which prompts and nodes several clients are told, that draw with a file each, until all are done."""
    import aiohttp  # noqa: PLC0415 - comes with ComfyUI

    told: dict[str, Any] = {client: {"prompts": set(), "texts": set(), "own": set()} for client in clients}

    async def listen(client: str, socket: Any) -> None:
        done = 0
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                data = json.loads(message.data)
                done += data["type"] == "execution_success"
                told[client]["prompts"] |= {data["data"]["prompt_id"]} if "prompt_id" in data["data"] else set()
            elif struct.unpack(">I", message.data[:4])[0] == TEXT:
                (length,) = struct.unpack(">I", message.data[4:8])
                told[client]["texts"].add(message.data[8 : 8 + length].decode())
            if done == 2:
                await asyncio.sleep(0.5)  # for what is on its way to others
                return

    async with aiohttp.ClientSession() as session:
        sockets = [
            await session.ws_connect(f"http://127.0.0.1:{server.port}/ws?clientId={client}") for client in clients
        ]
        listening = [
            asyncio.create_task(listen(client, socket)) for client, socket in zip(clients, sockets, strict=True)
        ]
        for seed in range(2):
            for client, file in clients.items():
                graph = graphs.demo() | {"load": node("AMEDLoadPredictor", predictor_name=file)}
                graph |= {"apply": graphs.apply(["load", 0]), "latent": graphs.save_latent(["sample", 0], "clients")}
                graph |= {"sample": graphs.k_sampler(["apply", 0], "amed", "amed", 5, seed=seed)}
                told[client]["own"].add(server.queue(renamed(graph, client), client_id=client))
        await asyncio.wait_for(asyncio.gather(*listening), 120)
    return told


def test_each_client_is_told_of_its_own_prompts_only(server: Server) -> None:
    """Of texts on nodes, too: another browser may have a node of the same number."""
    files = {"first": "digits_amed_5.safetensors", "second": "digits_amed_multistep_5.safetensors"}
    told = asyncio.run(heard(server, files))
    for client, found in told.items():
        assert found["prompts"] == found["own"]
        assert f"{client}load" in found["texts"], "what the file is for"
        assert all(node_id.startswith(client) for node_id in found["texts"])


def test_a_killed_server_starts_again_and_goes_on(server: Server, trials: Any) -> None:
    """From the state that a cancelled training left, though the one that went on from there was killed."""
    training = graphs.train(effort="standard", save_as="killed", seed=12)
    graph = graphs.demo() | {"train": training, "report": node("PreviewAny", source=["train", 2])}
    states = server.base / "user" / "amed_training"
    others = set(states.glob("*.safetensors"))
    first = server.queue(graph)
    time.sleep(2.0)
    server.post("/interrupt")
    assert outcome(server.wait(first)) == "interrupted"
    (state,) = set(states.glob("*.safetensors")) - others
    for _ in range(trials.many(1, 3)):
        server.queue(graph)
        time.sleep(1.0)
        server.kill()
        trials.held("the state is there", state.is_file())
        server.start()
    outputs = server.run(graph)
    trials.held("it goes on", "before it was stopped" in outputs["report"]["text"][0], str(outputs["report"]))
    trials.held("a finished training leaves nothing", not state.is_file())
    trials.held("it is saved", (server.base / "models" / "amed_predictors" / "killed_00001_.safetensors").is_file())
