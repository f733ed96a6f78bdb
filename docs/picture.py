"""Draws the system: ``python docs/picture.py`` writes ``docs/assets/system-light.svg`` and ``system-dark.svg``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT = 640, 560
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True)
class Palette:
    """Colours of one picture."""

    ink: str
    faint: str
    box: str
    line: str
    accent: str
    prompt: str
    generated: str
    warn: str


PALETTES = {
    "light": Palette("#1f2430", "#596273", "#f4f6fb", "#9aa5b8", "#3949ab", "#5c6bc0", "#aab4e8", "#c0392b"),
    "dark": Palette("#e6e9f0", "#a9b2c3", "#262b38", "#66718a", "#9fa8da", "#7986cb", "#4a5591", "#ff8a80"),
}


def text(x: float, y: float, words: str, colour: str, size: int = 17, *, bold: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{weight}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{fill}" stroke="{line}" stroke-width="1.5"/>'


def arrow(path: str, colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 5"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.2"{dash} marker-end="url(#head-{colour[1:]})"/>'


def head(colour: str) -> str:
    return (
        f'<marker id="head-{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
    )


def memory(p: Palette, x: float, y: float) -> list[str]:
    """The KV memory as a bar: residents with their prompt and what they have generated, then what is free."""
    parts = [f'<rect x="{x}" y="{y}" width="280" height="34" rx="4" fill="none" stroke="{p.line}" stroke-width="1.5"/>']
    at = x + 2
    for prompt, generated in ((44, 16), (26, 34), (36, 10), (18, 22)):
        parts.append(f'<rect x="{at}" y="{y + 2}" width="{prompt}" height="30" fill="{p.prompt}"/>')
        parts.append(f'<rect x="{at + prompt}" y="{y + 2}" width="{generated}" height="30" fill="{p.generated}"/>')
        at += prompt + generated + 2
    parts.append(text((at + x + 280) / 2, y + 23, "free", p.faint, 15))
    return parts


def picture(p: Palette) -> str:
    """The whole picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}" role="img" '
        'aria-label="Requests wait without memory until an agent or policy admits them into the engine, whose KV memory grows '
        'with every token; when it is full the engine evicts. The same policy runs on four backends.">',
        f"<defs>{head(p.accent)}{head(p.line)}{head(p.warn)}</defs>",
        box(150, 10, 340, 62, p.box, p.accent),
        text(320, 36, "Agent or policy", p.ink, 19, bold=True),
        text(320, 59, "decides who enters, and when", p.faint),
        # waiting
        text(92, 116, "requests arrive", p.faint),
        arrow("M92 124 V152", p.line),
        box(12, 156, 160, 170, p.box, p.line),
        text(92, 182, "Waiting", p.ink, 19, bold=True),
        text(92, 312, "no KV memory yet", p.faint, 16),
    ]
    for i, width in enumerate((96, 60, 118, 74)):
        parts.append(f'<rect x="34" y="{198 + i * 24}" width="{width}" height="16" rx="3" fill="{p.prompt}"/>')
    parts += [
        # engine
        box(298, 132, 330, 194, p.box, p.line),
        text(463, 158, "Engine: continuous batching", p.ink, 19, bold=True),
        *memory(p, 323, 172),
        text(463, 228, "KV memory of the residents:", p.faint, 16),
        f'<rect x="343" y="241" width="14" height="14" fill="{p.prompt}"/>',
        text(364, 254, "prompt", p.faint, 16, anchor="start"),
        f'<rect x="432" y="241" width="14" height="14" fill="{p.generated}"/>',
        text(453, 254, "generated so far", p.faint, 16, anchor="start"),
        text(463, 284, "each iteration adds one token", p.ink, 16),
        text(463, 306, "to every request that runs", p.ink, 16),
        # action and observation
        arrow("M172 241 H296", p.accent),
        text(235, 265, "admit", p.accent, bold=True),
        arrow("M235 72 V232", p.accent),
        text(226, 100, "action", p.accent, bold=True, anchor="end"),
        arrow("M425 132 V76", p.accent),
        text(434, 102, "observation, reward", p.accent, bold=True, anchor="start"),
        # eviction and completion
        arrow("M360 326 C360 384 92 384 92 330", p.warn, dashed=True),
        text(228, 393, "memory full: evicted, starts again", p.warn, 16),
        arrow("M545 326 V372", p.line),
        text(545, 393, "done: latency, TTFT", p.faint, 16),
        # backends
        text(320, 446, "The same policy object on every backend", p.ink, 18, bold=True),
    ]
    names = (("simulator", "compiled"), ("vLLM", "scheduler"), ("vLLM", "engine"), ("vLLM", "server"))
    for i, (first, second) in enumerate(names):
        x = 12 + i * 156
        parts += [box(x, 464, 148, 72, p.box, p.line), text(x + 74, 494, first, p.ink, bold=True), text(x + 74, 518, second, p.faint)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def write(folder: Path) -> None:
    for name, palette in PALETTES.items():
        (folder / f"system-{name}.svg").write_text(picture(palette), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent / "assets")
