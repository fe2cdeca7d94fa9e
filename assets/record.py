#!/usr/bin/env python3
"""Records the README's picture: two grapes, a peer and a chat, really run, as an animated SVG.

    pip install pyte
    cargo build --examples
    python3 assets/record.py

writes assets/walkthrough.svg. Needs Linux or macOS, and the TCP ports 20001 and 20002 of this
machine. The programs run on pseudo-terminals of the size of their panes, in an empty directory;
every step waits for what the program prints, so that a slow machine records the same picture.

What the picture changes: ids in addresses are shortened, and long waits too.
"""

import argparse
import codecs
import fcntl
import os
import pty
import random
import re
import selectors
import signal
import socket
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path
from xml.sax.saxutils import escape

import pyte

ROOT = Path(__file__).resolve().parent.parent
GRAPE_1 = "/ip4/127.0.0.1/tcp/20001"
GRAPE_2 = "/ip4/127.0.0.1/tcp/20002"
COLUMNS = 55

# The person's keys: seconds, as people type. Seeded, so that two recordings differ little.
KEY = (0.05, 0.12)
THINK = 0.55
# A longer wait of the programs is shown as one of this length.
IDLE = 0.9
HOLD = 3.0
# A program that is silent for so long has failed.
PATIENCE = 30.0
# Nobody sees two changes within this as two.
TICK = 0.04


class Screen(pyte.Screen):
    """Nothing may scroll away: the last picture tells the whole story."""

    def index(self):
        if self.cursor.y == self.lines - 1:
            shown = "\n".join(self.display)
            sys.exit(f"this and what follows does not fit into its pane; try again:\n{shown}")
        super().index()


class Program:
    """A command on a pseudo-terminal, and what its screen shows at which time."""

    def __init__(self, title, rows, has_person=False):
        # One list per line of the title: the command is all lines together.
        self.title = title
        self.rows = rows
        self.has_person = has_person
        self.shots = []
        self.pid = None
        self.screen = Screen(COLUMNS, rows)
        self.stream = pyte.Stream(self.screen)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.unfinished = ""

    def start(self, programs, directory):
        command = [word for line in self.title for word in line]
        path = programs / command[0]
        environment = {"HOME": directory, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            size = struct.pack("HHHH", self.rows, COLUMNS, 0, 0)
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            os.chdir(directory)
            os.execve(path, command, environment)
        self.screen.write_process_input = lambda text: os.write(self.terminal, text.encode())

    def read(self):
        """Takes what the program has printed; false when it has ended."""
        try:
            data = os.read(self.terminal, 65536)
        except OSError:  # Linux's way to say that nobody holds the other end.
            data = b""
        text = self.decoder.decode(data)
        if self.has_person:
            self.stream.feed(text)
        else:
            # By lines, so that no id is cut in two.
            *lines, self.unfinished = (self.unfinished + text).split("\n")
            self.stream.feed("".join(shorten(line) + "\n" for line in lines))
        return bool(data)

    def text(self):
        return "\n".join(line.rstrip() for line in self.screen.display)

    def before_cursor(self):
        cursor = self.screen.cursor
        return self.screen.display[cursor.y][: cursor.x]

    def end(self):
        """Returns the exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        self.pid = None
        return os.waitstatus_to_exitcode(status)


class Stage:
    """The programs that run, and the clock."""

    def __init__(self, programs, directory):
        self.programs = programs
        self.directory = directory
        self.running = selectors.DefaultSelector()
        self.begin = time.monotonic()
        self.dice = random.Random(20001)

    def now(self):
        return time.monotonic() - self.begin

    def start(self, program):
        program.start(self.programs, self.directory)
        self.running.register(program.terminal, selectors.EVENT_READ, program)
        self.shoot(program)

    def shoot(self, program, is_running=True):
        program.shots.append((self.now(), Picture(program, is_running)))

    def pump(self, timeout):
        for key, _ in self.running.select(timeout):
            program = key.data
            is_running = program.read()
            if not is_running:
                self.running.unregister(program.terminal)
                os.close(program.terminal)
            self.shoot(program, is_running)

    def pause(self, seconds):
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.running.get_map():
                self.pump(left)

    def until(self, program, is_true, what):
        end = time.monotonic() + PATIENCE
        while not is_true():
            if time.monotonic() > end:
                sys.exit(f"{program.title[0][0]} did not show {what}:\n{program.text()}")
            self.pump(0.1)

    def see(self, program, pattern):
        self.until(program, lambda: re.search(pattern, program.text(), re.MULTILINE), pattern)

    def type(self, program, prompt, line):
        """Types at a prompt, and sees every key arrive before the next."""
        self.until(program, lambda: program.before_cursor() == prompt, prompt)
        self.pause(THINK)
        for typed in range(1, len(line) + 1):
            os.write(program.terminal, line[typed - 1].encode())
            shown = prompt + line[:typed]
            self.until(program, lambda: program.before_cursor() == shown, shown)
            self.pause(self.dice.uniform(*KEY))
        self.pause(THINK / 2)
        os.write(program.terminal, b"\r")

    def until_end(self, program):
        running = self.running.get_map()
        self.until(program, lambda: program.terminal not in running, "its end")
        code = program.wait()
        if code != 0:
            sys.exit(f"{program.title[0][0]} ended with {code}:\n{program.text()}")


def perform(stage):
    """The scene. Returns the panes in reading order."""
    grape_1 = Program([["grape", "--listen", GRAPE_1], ["--bootstrap", GRAPE_2]], 6)
    grape_2 = Program([["grape", "--listen", GRAPE_2], ["--bootstrap", GRAPE_1]], 6)
    peer = Program([["peer", "client1", "--bootstrap", GRAPE_1]], 11)
    chat = Program([["chat", "--bootstrap", GRAPE_2]], 11, has_person=True)
    panes = [grape_1, grape_2, peer, chat]
    try:
        stage.pause(0.4)
        # Both at once: a grape that has to wait for the other one tells so.
        stage.start(grape_1)
        stage.start(grape_2)
        for grape in (grape_1, grape_2):
            stage.see(grape, "connected to the grape")
        stage.pause(0.8)
        stage.start(peer)
        stage.see(peer, "^announced client1$")
        stage.pause(0.8)
        stage.start(chat)
        stage.see(chat, "connected to the grape")
        stage.type(chat, "Name: ", "client1")
        stage.see(chat, "^client1: 1 provider: ")
        for message in ("hello", "how are you?"):
            stage.type(chat, "client1> ", message)
            stage.see(chat, f": Echo: {re.escape(message)}$")
            stage.see(peer, f": {re.escape(message)}$")
        stage.type(chat, "client1> ", "exit")
        stage.until_end(chat)
    finally:
        for program in panes:
            if program.pid:
                program.end()
    return panes


def shorten(line):
    """An id with its last characters, by which the programs tell ids too."""
    return re.sub(r"\b(12D3KooW)\w{36}(\w{8})\b", r"\1…\2", line)


WIDTH = 900
FONT, CELL, LEADING = 12.2, 7.34, 18
TITLE_FONT, TITLE_CELL, TITLE_LEADING = 11, 6.62, 16
GAP = 12
PAD = 14
PANE = (WIDTH - 3 * GAP) / 2

BACKDROP, SCREEN, TITLE, EDGE = "#16131f", "#1e1a2a", "#282338", "#3a3350"
TEXT, STRONG, MUTED, ACCENT = "#cfcadd", "#f6f3ff", "#968eb0", "#c4a1ff"
LIVE, OFF = "#86d39b", "#524a6b"
COLOURS = {
    "black": "#5d5675",
    "red": "#f08a9b",
    "green": LIVE,
    "brown": "#e8c583",
    "blue": "#8fb4ff",
    "magenta": ACCENT,
    "cyan": "#7fd0d8",
    "white": STRONG,
}


class Picture:
    """What a screen shows at one moment."""

    def __init__(self, program, is_running):
        screen = program.screen
        cells = [[screen.buffer[y][x] for x in range(COLUMNS)] for y in range(program.rows)]
        self.rows = [runs(row) for row in cells]
        self.is_running = is_running
        self.cursor = None
        if program.has_person and is_running and not screen.cursor.hidden:
            self.cursor = (min(screen.cursor.x, COLUMNS - 1), screen.cursor.y)


def runs(cells):
    """The pieces of a row that look alike: column, text, colour, whether bold."""
    found = []
    for x, cell in enumerate(cells):
        looks = (colour(cell), cell.bold)
        if found and found[-1][2:] == looks:
            found[-1] = (found[-1][0], found[-1][1] + cell.data, *looks)
        else:
            found.append((x, cell.data, *looks))
    trimmed = [(x, text.rstrip(), *looks) for x, text, *looks in found]
    return tuple(run for run in trimmed if run[1])


def colour(cell):
    if cell.fg == "default":
        return STRONG if cell.bold else TEXT
    if re.fullmatch("[0-9a-f]{6}", cell.fg):
        return f"#{cell.fg}"
    return COLOURS.get(cell.fg.removeprefix("bright"), TEXT)


class Timeline:
    """The recording's times, without long waits and in ticks."""

    def __init__(self, panes):
        self.times = {0.0: 0.0}
        before, shown = 0.0, 0.0
        for at in sorted(at for pane in panes for at, _ in pane.shots):
            shown += min(at - before, IDLE)
            before = at
            self.times[at] = round(shown / TICK) * TICK
        self.length = round(shown + HOLD, 2)

    def spans(self, shots, look):
        """How long each thing was seen that `look` finds in a picture: (from, to, thing)."""
        seen = {0.0: None}
        for at, picture in shots:
            seen[self.times[at]] = look(picture)
        starts = sorted(seen)
        spans = []
        for start, end in zip(starts, starts[1:] + [self.length]):
            if spans and spans[-1][2] == seen[start]:
                spans[-1] = (spans[-1][0], end, seen[start])
            else:
                spans.append((start, end, seen[start]))
        return [span for span in spans if span[2]]


class Drawing:
    """Things that are seen for a while. Without animation only the last moment is seen."""

    def __init__(self, length):
        self.length = length
        self.keyframes = {}
        self.parts = []

    def add(self, part):
        self.parts.append(part)

    def add_between(self, start, end, part):
        is_last = end >= self.length
        if start <= 0 and is_last:
            return self.add(part)
        name = self.keyframes.setdefault((start, end), f"k{len(self.keyframes)}")
        hidden = "" if is_last else ' opacity="0"'
        self.add(f'<g class="a {name}"{hidden}>{part}</g>')

    def style(self):
        # Asks for motion to be welcome, so that who knows nothing of it shows the last moment.
        moves = [f".a{{animation:{self.length:g}s step-end infinite}}"]
        for (start, end), name in self.keyframes.items():
            stops = [(start, 1)] if start <= 0 else [(0, 0), (start, 1)]
            if end < self.length:
                stops.append((end, 0))
            frames = "".join(
                f"{100 * at / self.length:.5g}%{{opacity:{opacity}}}" for at, opacity in stops
            )
            moves.append(f".{name}{{animation-name:{name}}}@keyframes {name}{{{frames}}}")
        fonts = "ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
        return "\n".join(
            [
                f"text{{font:{FONT}px {fonts};white-space:pre;font-variant-ligatures:none}}",
                f"text.t{{font-size:{TITLE_FONT}px}}",
                "text.b{font-weight:700}",
                "@media (prefers-reduced-motion:no-preference){",
                *moves,
                "}",
            ]
        )


def draw(panes):
    timeline = Timeline(panes)
    drawing = Drawing(timeline.length)
    y = GAP
    for left, right in zip(panes[::2], panes[1::2]):
        draw_pane(drawing, timeline, left, GAP, y)
        height = draw_pane(drawing, timeline, right, 2 * GAP + PANE, y)
        y += height + GAP
    caption = "Two grapes, a peer and a chat: a message finds its way by name, its echo comes back"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:g}" '
            f'width="{WIDTH}" height="{y:g}" role="img" xml:space="preserve">',
            f"<title>{caption}</title>",
            f"<style>{drawing.style()}</style>",
            f'<rect width="{WIDTH}" height="{y:g}" rx="12" fill="{BACKDROP}"/>',
            *drawing.parts,
            "</svg>\n",
        ]
    )


def draw_pane(drawing, timeline, pane, x, y):
    """Returns its height."""
    bar = TITLE_LEADING * len(pane.title) + 14
    height = bar + LEADING * pane.rows + 12
    drawing.add(
        f'<rect x="{x:g}" y="{y:g}" width="{PANE:g}" height="{height:g}" rx="8" '
        f'fill="{SCREEN}" stroke="{EDGE}"/>'
    )
    bottom = y + bar
    drawing.add(
        f'<path d="M{x:g} {bottom:g}v{8 - bar:g}a8 8 0 0 1 8-8h{PANE - 16:g}a8 8 0 0 1 8 8'
        f'V{bottom:g}z" fill="{TITLE}" stroke="{EDGE}"/>'
    )
    draw_title(drawing, timeline, pane, x + PAD, y + 7 + TITLE_LEADING / 2)
    top = bottom + 9
    for row in range(pane.rows):
        baseline = top + LEADING * row + 13
        for start, end, found in timeline.spans(pane.shots, lambda shot: shot.rows[row]):
            parts = [
                label(x + PAD + CELL * column, baseline, CELL, text, fill, "b" if bold else "")
                for column, text, fill, bold in found
            ]
            drawing.add_between(start, end, "".join(parts))
    for start, end, (column, row) in timeline.spans(pane.shots, lambda shot: shot.cursor):
        drawing.add_between(
            start,
            end,
            f'<rect x="{x + PAD + CELL * column:.4g}" y="{top + LEADING * row + 1.5:g}" '
            f'width="{CELL:g}" height="15" rx="1" fill="{ACCENT}" fill-opacity=".75"/>',
        )
    return height


def draw_title(drawing, timeline, pane, x, middle):
    """The command, and a light that is on while it runs."""
    light = f'<circle cx="{x + 4:g}" cy="{middle:g}" r="4" fill='
    drawing.add(f'{light}"{OFF}"/>')
    for start, end, _ in timeline.spans(pane.shots, lambda shot: shot.is_running):
        drawing.add_between(start, end, f'{light}"{LIVE}"/>')
    x += 20
    program = pane.title[0][0]
    for number, words in enumerate(pane.title):
        column = len(program) + 1 if number else 0
        for word in words:
            fill = ACCENT if word is program else MUTED if word.startswith("--") else TEXT
            classes = "t b" if word is program else "t"
            baseline = middle + TITLE_LEADING * number + 4
            at = x + TITLE_CELL * column
            drawing.add(label(at, baseline, TITLE_CELL, word, fill, classes))
            column += len(word) + 1


def label(x, y, cell, text, fill, classes):
    """Text on the grid, whatever the width of the viewer's font."""
    classes = f' class="{classes}"' if classes else ""
    return (
        f'<text x="{x:.5g}" y="{y:g}" textLength="{cell * len(text):.5g}" '
        f'fill="{fill}"{classes}>{escape(text)}</text>'
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, default=ROOT / "target/debug/examples")
    parser.add_argument("--output", type=Path, default=ROOT / "assets/walkthrough.svg")
    options = parser.parse_args()
    programs = options.programs.resolve()
    for name in ("grape", "peer", "chat"):
        if not (programs / name).is_file():
            sys.exit(f"no {name} in {options.programs}: run cargo build --examples first")
    for port in (20001, 20002):
        if is_taken(port):
            sys.exit(f"port {port} is taken: stop what listens there")
    with tempfile.TemporaryDirectory() as directory:
        panes = perform(Stage(programs, directory))
        refuse_private(panes, [directory, str(ROOT), str(Path.home()), socket.gethostname()])
    picture = draw(panes)
    options.output.write_text(picture, encoding="utf-8")
    print(f"{options.output}: {len(picture.encode()) / 1000:.0f} kB")


def is_taken(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def refuse_private(panes, words):
    """The picture is published: nothing in it may tell of the machine it was made on."""
    shown = "\n".join(pane.text() for pane in panes)
    addresses = set(re.findall(r"/ip[46]/([^/\s]+)", shown)) - {"127.0.0.1"}
    private = [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", shown)]
    found = sorted(addresses) + private
    if found:
        sys.exit(f"the programs show what is not to be published: {', '.join(found)}")


if __name__ == "__main__":
    main()
