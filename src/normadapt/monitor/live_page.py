"""The live page's frame as HTML, the page that asks for a token, and the files that both load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from html import escape

from normadapt.monitor.report_page import asset, plotly_script
from normadapt.page_style import STYLE, frame
from normadapt.version import __version__

_SCRIPT = "text/javascript; charset=utf-8"

ASSETS: Mapping[str, tuple[Callable[[], str], str]] = {
    "plotly.js": (plotly_script, _SCRIPT),
    "figures.js": (lambda: asset("figures.js"), _SCRIPT),
    "live.js": (lambda: asset("live.js"), _SCRIPT),
    "page.css": (lambda: STYLE + asset("page.css") + asset("live.css"), "text/css; charset=utf-8"),
}
"""What the page loads, by name: how it is read, and what it is."""


def live_page(title: str | None) -> str:
    """The page before anything is known; `live.js` fills it.

    Args:
        title: What stands at the top; the model's name otherwise.
    """
    scripts = "".join(f'<script src="{_address(name)}" defer></script>\n' for name in ASSETS if name.endswith(".js"))
    main = _MAIN.format(
        title=escape(title or "normadapt"), fixed="" if title is None else " data-fixed", version=__version__
    )
    return _frame(title or "normadapt", main, scripts)


def login_page(*, wrong: bool = False) -> str:
    """The page that asks for the token.

    Args:
        wrong: Whether one was given that is not right.
    """
    return _frame("normadapt: token", _LOGIN.format(wrong=_WRONG if wrong else ""), "")


@cache
def _address(name: str) -> str:
    """A file's relative address, another one when its content is another."""
    digest = hashlib.sha256(ASSETS[name][0]().encode()).hexdigest()
    return f"assets/{name}?v={digest[:16]}"


def _frame(title: str, main: str, scripts: str) -> str:
    icon = f'<link rel="icon" href="data:image/svg+xml,{_ICON}">\n'
    return frame(title, f'{icon}<link rel="stylesheet" href="{_address("page.css")}">\n{scripts}', f"{main}\n")


# Two bell curves, the second one shifted.
_ICON = (
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32' fill='none' stroke-width='3'%3E"
    "%3Cpath d='M1 27C8 27 8 6 12 6s4 21 11 21' stroke='%230b62c4'/%3E"
    "%3Cpath d='M10 27C17 27 17 6 21 6s4 21 10 21' stroke='%23c04a18'/%3E%3C/svg%3E"
)

_LOGIN = """<main class="login">
<h1>This page asks for a token</h1>
<p class="lead">Whoever started it knows it: <code>--token</code>, or <code>NORMADAPT_TOKEN</code>.</p>
<form method="post" action="login">
{wrong}<label for="token">token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Open</button>
</form>
</main>"""

_WRONG = '<p class="problem" role="alert">That is not the token.</p>\n'

_MAIN = """<main>
<header class="top">
<div><h1 id="title"{fixed}>{title}</h1><p class="lead" id="lead">Nothing was seen yet.</p></div>
<div class="side">
<p class="link" id="link" role="status" data-state="waiting">connecting</p>
<label>stream <select id="stream"><option value="">none yet</option></select></label>
</div>
</header>
<p class="problem" id="note" role="alert" hidden></p>
<noscript><p class="problem">This page needs scripts; <code>normadapt report</code> makes one that tells most
without.</p></noscript>
<section class="trial" id="trial-part" aria-labelledby="trial-title" hidden>
<h2 id="trial-title">The trial</h2>
<div id="trial"></div>
<div class="buttons" id="buttons" hidden>
<button type="button" id="pause">Pause</button>
<button type="button" id="promote">Promote</button>
<button type="button" id="rollback" class="danger">Roll back</button>
<p class="note" id="done" role="status"></p>
</div>
<p class="note" id="saved"></p>
</section>
<div id="words"></div>
<div id="domains"></div>
<div id="figures"></div>
<div id="layers"></div>
<div id="log-part"></div>
<p class="note foot">Shift: how far a layer’s statistics have left the source’s, in standard deviations (sd) of its
output. Probability by chance: of at least that shift if there were none. normadapt {version}.</p>
</main>
<dialog id="ask" aria-labelledby="ask-title">
<form id="ask-form">
<h2 id="ask-title">Roll back</h2>
<p id="ask-text"></p>
<p class="problem" id="ask-problem" role="alert" hidden></p>
<label id="to-field">snapshot <select id="to"></select></label>
<label id="force-field"><input type="checkbox" id="force"> even though the stage is not complete</label>
<label>your name <input id="by" type="text" maxlength="100" required autocomplete="name"></label>
<label id="reason-field">why <input id="reason" type="text" maxlength="500" autocomplete="off"></label>
<p class="note">Name and reason go into the audit log.</p>
<div class="buttons"><button type="button" id="cancel">Cancel</button>
<button type="submit" id="confirm">Confirm</button></div>
</form>
</dialog>"""
