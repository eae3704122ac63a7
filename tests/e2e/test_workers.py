"""N workers behind one controller: killed, reloaded and restarted under load, and still exact."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from .nodes import FORBID, Load, node, started, upstream
from .test_ways import free_port


def serving(status: dict[str, Any]) -> dict[int, int]:
    """Slot -> pid of the workers that accept."""
    return {worker["slot"]: worker["pid"] for worker in status["workers"] if worker["state"] == "ready"}


async def test_one_budget_is_spent_exactly_by_four_workers(tmp_path: Path) -> None:
    limit = 5000
    budget = f'[[metering.budgets]]\nlevel = "org"\nmetric = "requests"\nlimit = "{limit}"\nwindow = "total"\n'
    async with upstream() as up, node(tmp_path, up, free_port(), budget, "--workers", "4") as creto:
        await creto.ready()
        load = Load(creto.port, kept=24, fresh=8, limit=limit + 500, pause_s=0)
        await load.done()
        status = await creto.until(lambda s: sum(w["requests"] for w in s["workers"]) == limit + 500, "not counted")
        assert await creto.end() == 0
    assert load.broken == []
    assert Counter(load.answered.values()) == {200: limit, 429: 500}
    assert all(worker["requests"] > 0 for worker in status["workers"]), "each of the four carried some"
    assert sum(creto.recorded().values()) == limit + 500


async def test_what_was_answered_is_recorded_once_however_often_workers_are_killed(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port(), "", "--workers", "2") as creto:
        await creto.ready()
        load = Load(creto.port, kept=6, fresh=4)
        for round_ in range(4):
            await load.answers(150)
            status = await creto.until(lambda s: len(serving(s)) == 2, "a worker is missing")
            os.kill(serving(status)[round_ % 2], signal.SIGKILL)
        await load.answers(300)
        status = await creto.ready()
        assert status["restarts"] == 4
        await load.stop()
        assert await creto.end() == 0
    assert len(load.broken) <= 4 * 10, "only what was on the wire with a worker that was killed"
    recorded = creto.recorded()
    assert {path: recorded[path] for path in paths(load) if recorded[path] != 1} == {}


async def test_connections_that_wait_for_a_dead_worker_are_served_by_its_successor(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port()) as creto:
        status = await creto.ready()
        os.kill(serving(status)[0], signal.SIGKILL)
        load = Load(creto.port, kept=5, fresh=5, limit=100)
        await load.done()
    assert load.broken == []
    assert Counter(load.answered.values()) == {200: 100}


async def test_new_policies_are_taken_in_place(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port(), "", "--workers", "2") as creto:
        before = await creto.ready()
        load = Load(creto.port, kept=8, fresh=4)
        await load.answers(100)
        (creto.policies / "more.cedar").write_text(FORBID)
        creto.signal(signal.SIGHUP)
        after = await creto.until(lambda s: s["reload"]["count"] == 1, "it did not reload")
        await load.answers(100)
        refused = Load(creto.port, kept=2, fresh=0, prefix="/up/forbidden", limit=4)
        await refused.done()
        await load.stop()
    assert after["reload"]["failed"] == 0 and after["policy"] != before["policy"]
    assert serving(after) == serving(before), "the same processes serve on"
    assert load.broken == [] and set(load.answered.values()) == {200}
    assert set(refused.answered.values()) == {403}


async def test_a_reload_replaces_every_worker_and_breaks_nothing(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port(), "", "--workers", "2") as creto:
        before = await creto.ready()
        load = Load(creto.port, kept=20, fresh=10)
        await load.answers(200)
        creto.config.write_text(creto.config.read_text() + '\n[limits]\nbody_bytes = 4096\n[metering]\nunmetered = "allow"\n')
        creto.signal(signal.SIGHUP)
        after = await creto.until(lambda s: s["reload"]["count"] == 1 and len(s["workers"]) == 2, "it did not reload")
        await load.answers(200)
        await load.stop()
        assert await creto.end() == 0
    assert after["reload"]["failed"] == 0 and after["generation"] == before["generation"] + 1
    assert after["pid"] == before["pid"] and after["run"] == before["run"]
    assert not set(serving(after).values()) & set(serving(before).values())
    assert load.broken == [] and set(load.answered.values()) == {200}
    recorded = creto.recorded()
    assert {path: recorded[path] for path in paths(load) if recorded[path] != 1} == {}


async def test_a_hot_restart_keeps_the_process_and_every_connection(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port(), "", "--workers", "2") as creto:
        before = await creto.ready()
        ca = next(creto.state.glob("runs/*/ca.pem")).read_bytes()
        load = Load(creto.port, kept=20, fresh=10)
        await load.answers(150)
        creto.signal(signal.SIGUSR2)
        unready: set[str] = set()

        def restarted(status: dict[str, Any]) -> bool:
            unready.update(status["waiting"])
            return bool(status["reload"]["count"] == 1 and len(status["workers"]) == 2)

        after = await creto.until(restarted, "no restart")
        await load.answers(150)
        await load.stop()
        assert next(creto.state.glob("runs/*/ca.pem")).read_bytes() == ca
        assert await creto.end() == 0
    assert after["generation"] == before["generation"] + 1
    assert after["pid"] == before["pid"] and after["started_at"] == before["started_at"]
    assert unready == set(), "it was ready all the time"
    assert load.broken == [] and set(load.answered.values()) == {200}
    recorded = creto.recorded()
    assert {path: recorded[path] for path in paths(load) if recorded[path] != 1} == {}


async def test_a_reload_that_fails_at_the_last_moment_changes_nothing(tmp_path: Path) -> None:
    """The new address is taken: nobody can know before the sockets are opened, in the new program image."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        async with upstream() as up, node(tmp_path, up, free_port()) as creto:
            before = await creto.ready()
            load = Load(creto.port, kept=3, fresh=3)
            text = creto.config.read_text()
            creto.config.write_text(text.replace(f":{creto.port}", f":{other.getsockname()[1]}"))
            done = await asyncio.to_thread(creto.command, "reload")
            status = await asyncio.to_thread(creto.command, "status")
            creto.config.write_text(text)
            again = await asyncio.to_thread(creto.command, "reload")
            after = await creto.ready()
            await load.answers(20)
            await load.stop()
            assert await creto.end() == 0
    assert done.returncode == 2 and "address already in use" in done.stderr
    assert status.returncode == 1 and "reload failed: listen.reverse" in status.stderr
    assert str(serving(before)[0]) in status.stdout, "the same worker serves on"
    assert again.returncode == 0, again.stderr
    assert after["generation"] > before["generation"] and after["reload"]["failed"] == 0
    assert load.broken == [] and set(load.answered.values()) == {200}


async def test_new_workers_that_do_not_come_up_leave_the_old_ones_and_their_successors(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    async with upstream() as up, node(tmp_path, up, free_port()) as creto:
        before = await creto.ready()
        load = Load(creto.port, kept=3, fresh=3)
        text = creto.config.read_text()
        creto.config.write_text(text.replace("[egress]\n", f'[egress]\nupstream_ca = "{tmp_path}/ca.pem"\n'))
        (creto.policies / "more.cedar").write_text(FORBID)
        done = await asyncio.to_thread(creto.command, "reload")
        after = await creto.ready()
        await load.answers(20)
        await load.stop()
        os.kill(serving(after)[0], signal.SIGKILL)
        again = Load(creto.port, kept=2, fresh=2, prefix="/up/forbidden", limit=20)
        await again.done()
        assert await creto.end() == 0
    assert done.returncode == 2 and "did not come up" in done.stderr
    assert any("holds no usable CA certificate" in line for line in creto.said)
    assert serving(after) == serving(before)
    assert load.broken == again.broken == []
    assert set(load.answered.values()) == set(again.answered.values()) == {200}, "by the configuration and policies there were"


async def test_a_worker_that_is_told_to_end_is_replaced_without_breaking_anything(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port()) as creto:
        before = await creto.ready()
        load = Load(creto.port, kept=5, fresh=5)
        await load.answers(20)
        os.kill(serving(before)[0], signal.SIGTERM)
        await creto.until(lambda s: s["ready"] and not set(serving(s).values()) & set(serving(before).values()), "it stays")
        await load.answers(20)
        await load.stop()
    assert load.broken == [] and set(load.answered.values()) == {200}


async def test_the_service_manager_hears_when_it_is_ready_and_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.setblocking(False)
        loop = asyncio.get_running_loop()
        async with upstream(silent=True) as up:
            more = "[limits]\ndrain_s = 600\n"
            async with node(tmp_path, up, free_port(), more, environment={"NOTIFY_SOCKET": address}) as creto:
                assert (await asyncio.wait_for(loop.sock_recv(manager, 200), 60)).startswith(b"READY=1\n")
                load = Load(creto.port, kept=1, fresh=0)  # its one request is never answered
                await creto.until(lambda s: s["workers"][0]["connections"] == 1, "it did not connect")
                creto.signal(signal.SIGTERM)
                assert await asyncio.wait_for(loop.sock_recv(manager, 200), 60) == b"STOPPING=1"
                assert await creto.end() == 0
                load.stop_soon()
                await load.done()
    assert load.answered == {} and len(load.broken) >= 1
    assert creto.recorded()["/0/0"] == 1


async def test_a_reload_with_mistakes_changes_nothing(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port()) as creto:
        before = await creto.ready()
        text = creto.config.read_text()
        creto.config.write_text(text + "\n[limits]\nbody_bytes = -1\ndrain_s = 'soon'\n")
        configuration = await creto.ask("reload")
        creto.config.write_text(text)
        (creto.policies / "broken.cedar").write_text("permit (principal, action, resource);\npermit (")
        policy = await creto.ask("reload")
        after = await creto.ready()
        os.kill(serving(after)[0], signal.SIGKILL)  # its successor does not read the files either
        load = Load(creto.port, kept=2, fresh=1, limit=30)
        await load.done()
        assert await creto.end() == 0
    assert len(configuration["problems"]) == len(policy["problems"]) == 2
    assert after["reload"]["failed"] == 2
    assert (after["policy"], serving(after)) == (before["policy"], serving(before))
    problems = configuration["problems"] + policy["problems"]
    assert all(any(problem in line for line in creto.said) for problem in problems)
    assert load.broken == [] and set(load.answered.values()) == {200}


async def test_more_and_fewer_workers_by_reload(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port(), "[sidecar]\nworkers = 1\n") as creto:
        await creto.ready()
        load = Load(creto.port, kept=6, fresh=6)
        for workers in (2, 1):
            text = creto.config.read_text()
            creto.config.write_text(text[: text.index("[sidecar]")] + f"[sidecar]\nworkers = {workers}\n")
            done = await asyncio.to_thread(creto.command, "reload")
            assert (done.returncode, done.stderr) == (0, "")
            assert len(serving(await creto.ready())) == workers
            await load.answers(100)
        await load.stop()
        assert await creto.end() == 0
    assert load.broken == [] and set(load.answered.values()) == {200}


async def test_workers_of_a_killed_controller_end_and_the_next_adopts_what_they_recorded(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port(), "", "--workers", "2") as creto:
        await creto.ready()
        load = Load(creto.port, kept=4, fresh=2)
        await load.answers(100)
        creto.process.kill()
        await creto.process.wait()
        load.stop_soon()
        await load.done()
        again = await started(creto.config)
        creto.process = again
        await creto.ready()
        assert await creto.end() == 0
        assert again.stderr is not None
        await again.stderr.read()
    recorded = creto.recorded()
    assert {path: recorded[path] for path in paths(load) if recorded[path] != 1} == {}


async def test_a_worker_that_cannot_start_is_said_and_tried_ever_more_slowly(tmp_path: Path) -> None:
    async with upstream() as up, node(tmp_path, up, free_port()) as creto:
        await creto.ready()
        ledger = creto.state / "metering.db"
        with contextlib.closing(sqlite3.connect(ledger)) as database, database:
            database.execute("update schema_version set version = version + 1")
        for worker in creto.status()["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
        status = await creto.until(lambda s: any("has failed" in why for why in s["waiting"]), "it looks ready")
        assert not status["ready"]
        await creto.until(lambda _: any("keeps ending" in line for line in creto.said), "nobody was told")
        with contextlib.closing(sqlite3.connect(ledger)) as database, database:
            database.execute("update schema_version set version = version - 1")
        await creto.ready()


def paths(load: Load) -> list[str]:
    """What was answered, as it is recorded."""
    return [path.removeprefix("/up") for path in load.answered]
