"""The demo: a small world in network namespaces, and what lbagent does in it, told as it happens.

    sudo make demo               tells the story, then stays up for you to explore
    sudo make demo ARGS=--once   tells it, asserts every claim, and ends

Last line: `demo: ok, <requests> requests, <failed> failed`, exit 0; or `demo: FAILED, <why>`, exit 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.leftovers import MARK, left_behind, traces
from tests.world import consul
from tests.world.lab import LBAGENT, Lab, lab
from tests.world.net import WorldError
from tests.world.procs import ROOT, until
from tests.world.traffic import Event, Traffic, failed, spread

VIP = "203.0.113.10"
URL = f"http://{VIP}/"
SETTLE_S = 3
REACTION_S = (
    1.0  # from Consul's word to the agent's deed; far above what it takes, far below a check's second
)


class Interrupted(BaseException):
    """SIGINT or SIGTERM: a reason to clean up, not an error."""


class Claim(AssertionError):
    """Something that this demo promises did not come true."""


def claim(truth: bool, text: str, why: str = "") -> None:
    """Say that it is so; end the demo if it is not."""
    if not truth:
        raise Claim(f"not true that {text}" + (f": {why}" if why else ""))
    print(f"   ✓ {text}", flush=True)


def chapter(title: str) -> None:
    print(f"\n▶ {title}", flush=True)


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def table(events: Iterable[Event], here: Lab) -> None:
    """Who answered, and who owns how much of the ring."""
    answered = spread(events)
    backends = here.edge.backends("web")
    total, slots = sum(answered.values()) or 1, sum(b["slots"] for b in backends.values()) or 1
    say("backend  address      standing     ring     answered")
    for node, backend in sorted(backends.items()):
        share, count = backend["slots"] / slots, answered[node]
        bar = "█" * round(20 * count / total)
        say(f"{node:8} {backend['address']:12} {backend['standing']:12} {share:5.1%}   {count:6}  {bar}")


@dataclass(slots=True)
class Story:
    here: Lab
    traffic: list[Traffic] = field(default_factory=list)
    killed_at: float = 0.0
    gone_at: float = 0.0
    total: int = 0
    failed: int = 0
    is_told: bool = False

    def run(self, what: str, path: str = "/", **options: float) -> Traffic:
        self.traffic.append(self.here.traffic(what, VIP, path, **options))
        return self.traffic[-1]

    def requests(self, count: int) -> list[Event]:
        """All of them succeed, or the story ends here."""
        running = self.run("requests", count=count)
        running.finish()
        events = running.events()
        bad = failed(events)
        claim(
            len(events) == count and not bad,
            f"{count} of {count} HTTP requests to {URL} succeed",
            f"{len(bad)} of {len(events)} failed, the first: {bad[0].error if bad else '-'}",
        )
        return events

    def tell(self) -> None:
        self.a_service_appears()
        steady = self.run("steady", rate=50)
        say("from here on a client asks 50 times a second until the end; each failure counts")
        downloads = self.a_backend_joins()
        self.a_backend_drains(steady, downloads)
        self.a_server_dies(steady)
        self.the_agent_dies(steady)
        steady.stop()
        self.judge(steady)

    def a_service_appears(self) -> None:
        chapter("Service web registers on b1, b2 and b3, with the tag `lb`")
        names = ("b1", "b2", "b3")
        self.register(*names)
        self.here.until_serving("web", *names)
        say(f"the agent saw it in Consul and announced {VIP}:80")
        events = self.requests(300)
        table(events, self.here)
        claim(set(spread(events)) == set(names), "all three backends took part")

    def register(self, *names: str) -> None:
        self.here.register("web", VIP, *names, meta={"lb-settle": f"{SETTLE_S}s"})

    def a_backend_joins(self) -> Traffic:
        self.here.until_settled("web")
        chapter("30 slow downloads begin, to last until we say so; then a fourth backend registers")
        downloads = self.run("downloads", "/download?rate=40000", count=30)
        by = spread(downloads.until_begun(30))
        say("under way: " + ", ".join(f"{count} on {node}" for node, count in sorted(by.items())))
        self.here.add_backend("b4", 24)
        self.here.until_up("b4")
        self.register("b4")
        self.here.until_serving("web", "b1", "b2", "b3", "b4")
        events = self.requests(300)
        table(events, self.here)
        share = spread(events)["b4"] / 300
        claim(0.1 < share < 0.4, f"b4 takes its share: {share:.0%} of new connections")
        begun, ended = downloads.events("begin"), downloads.events("end")
        claim(
            not failed(ended) and len(ended) < len(begun),
            f"{len(begun) - len(ended)} downloads go on, none broke",
        )
        return downloads

    def a_backend_drains(self, steady: Traffic, downloads: Traffic) -> None:
        chapter("b1 is drained over HTTP, with downloads still open on it")
        node = "b1"
        answer = self.here.edge.drain("web", node, reason="demo")
        drained_at = time.monotonic()
        say(f"the agent answers: {answer['records']} flow records, empty: {str(answer['empty']).lower()}")
        claim(not answer["empty"], f"{node} is not called empty while downloads are open on it")
        events = self.requests(200)
        claim(node not in spread(events), f"none of these new connections went to {node}")
        self.here.release()
        downloads.finish()
        ended = downloads.events("end")
        claim(
            len(ended) == 30 and not failed(ended),
            f"all 30 downloads ended whole, checksums right, {spread(ended)[node]} of them on {node}",
            ", ".join(sorted({event.error for event in failed(ended)})),
        )
        answer = self.here.edge.drain("web", node, wait_s=20 + SETTLE_S)
        claim(answer["empty"], f"{node} is empty now: it could be switched off")
        late = [event for event in steady.events() if event.start > drained_at and event.server == node]
        claim(not late, f"{node} got no new connection since the drain")
        self.here.edge.undrain("web", node)
        self.here.until_serving("web", "b1", "b2", "b3", "b4")
        events = self.requests(200)
        claim(
            spread(events)[node] > 0,
            f"undrained, {node} takes its share again: {spread(events)[node]} of 200",
        )

    def a_server_dies(self, steady: Traffic) -> None:
        chapter("The web server of b2 is killed")
        self.killed_at = time.monotonic()
        self.here.backends["b2"].web.stop(signal.SIGKILL)
        until(lambda: self.here.server.health("web")["web-b2"] == "critical", "Consul to call b2 critical")
        critical_at = time.monotonic()
        say(f"its check said so after {critical_at - self.killed_at:.1f} s")
        self.here.until_serving("web", "b1", "b3", "b4")
        self.gone_at = time.monotonic()
        took = self.gone_at - critical_at
        claim(took < REACTION_S, f"b2 got no more packets {took * 1000:.0f} ms later")
        events = self.requests(300)
        table(events, self.here)
        lost = [e for e in failed(steady.events()) if e.end >= self.killed_at]
        say(f"{len(lost)} requests went to the dead server before its check said so, and failed")

    def the_agent_dies(self, steady: Traffic) -> None:
        chapter("The agent is killed with SIGKILL, in the middle of traffic")
        killed_at = time.monotonic()
        before = len(steady.events())
        self.here.edge.kill(signal.SIGKILL)
        until(lambda: len(steady.events()) > before + 100, "100 requests without an agent")
        self.requests(200)
        say("no agent runs; it is started again")
        begun = time.monotonic()
        self.here.edge.start()
        took = time.monotonic() - begun
        claim(
            self.here.edge.status()["adopted"],
            f"it adopted the running program and was ready after {took:.1f} s",
        )
        self.here.until_serving("web", "b1", "b3", "b4")
        before = len(steady.events())
        until(lambda: len(steady.events()) > before + 50, "50 more requests")
        bad = [event for event in failed(steady.events()) if event.start > killed_at]
        claim(
            not bad,
            "no request failed meanwhile",
            f"{len(bad)} did, the first: {bad[0].error if bad else ''}",
        )

    def judge(self, steady: Traffic) -> None:
        """Only the killed server may have cost requests, and only until its check said so."""
        chapter("The whole story")
        events = [event for traffic in self.traffic for event in (*traffic.events(), *traffic.events("end"))]
        bad = failed(events)
        others = [e for e in bad if e.end < self.killed_at or e.start > self.gone_at]
        claim(
            not others,
            f"{len(events)} requests; the {len(bad)} failed ones all went to the killed server",
            f"{len(others)} others failed, the first: {others[0].error if others else ''}",
        )
        self.total, self.failed, self.is_told = len(events), len(bad), True


def explore(here: Lab) -> None:
    """Say what there is to see, and wait to be interrupted."""
    here.backends["b2"].web = here.start_web(here.backends["b2"].host)
    python, lbagent, socket = relative(sys.executable), relative(LBAGENT), f"--socket {here.edge.api.where}"
    enter = {name: " ".join(host.enter) for name, host in here.net.hosts.items()}
    print(f"""
▶ The world stays up, b2's server too, until you press Ctrl-C. As root, in this folder:

   a request        {enter["client"]} {python} -m tests.world.traffic get {URL}
   a hundred        {enter["client"]} {python} -m tests.world.traffic get {URL} --count 100
   what it knows    {lbagent} status {socket}
   drain            {lbagent} drain web b3/web-b3 --reason 'a look' --wait 60s {socket}
   undrain          {lbagent} undrain web b3/web-b3 {socket}
   the HTTP API     the same socket: GET /v1/status, /v1/services/web, /metrics
   on the edge      {enter["edge"]} bash
   on a backend     {enter["b1"]} bash
   Consul           {enter["edge"]} {relative(consul.binary())} catalog services
   the agent's log  tail -f {here.procs.folder}/lbagent.log
""")
    for host in here.net.hosts.values():
        if host.address:
            print(f"   {host.name:8} {host.address:12} namespace {host.namespace}")
    sys.stdout.flush()
    while True:
        signal.pause()


def relative(path: str) -> str:
    """As one would type it in this folder."""
    return path.removeprefix(f"{ROOT}/")


def on_signal(number: int, frame: object) -> None:
    """Once: what follows is cleaning up."""
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the story instead of staying up")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("demo: FAILED, it needs root: sudo make demo")
        return 1
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, on_signal)

    os.environ.setdefault(MARK, f"demo-{os.getpid()}")

    why = ""
    story: Story | None = None
    mine: set[str] = set()
    before = traces()
    try:
        chapter("A small world: a client, an edge node, three backends, a bridge, and Consul")
        with lab() as here:
            for host in here.net.hosts.values():
                say(f"{host.name:8} {host.address or '-':12} namespace {host.namespace}")
            say("the edge runs `lbagent run`, XDP native; each backend a web server and `lbagent backend`")
            try:
                story = Story(here)
                story.tell()
                if not args.once:
                    explore(here)
            except Exception:
                logs(here)
                raise
            finally:
                mine = {f"XDP program {number}" for number in here.net.programs()}
    except Interrupted as e:
        why = f"interrupted by {e}" if args.once or story is None or not story.is_told else ""
    except Exception as e:  # noqa: BLE001 - whatever it is, the last line says so
        if not isinstance(e, (WorldError, AssertionError)):
            traceback.print_exc()
        why = "; ".join([(str(e) or type(e).__name__).splitlines()[0], *getattr(e, "__notes__", [])])

    ours = f"lb{os.getpid()}"
    left = left_behind(before, lambda it: it in mine or ours in it or it.startswith("process"))
    if left:
        why = "; ".join(filter(None, [why, f"left behind: {', '.join(left)}"]))
    if why or story is None:
        print(f"\ndemo: FAILED, {why}", flush=True)
        return 1
    print(f"\ndemo: ok, {story.total} requests, {story.failed} failed", flush=True)
    return 0


def logs(here: Lab) -> None:
    """The latest words of everything that is lbagent."""
    for proc in here.procs.all:
        if proc.name.startswith(("lbagent", "helper")):
            print(proc.tail(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
