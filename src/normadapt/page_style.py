"""What the offline pages share: the frame, colours for light and dark, and the plainest elements."""

from html import escape

STYLE = """
:root{--bg:#fff;--fg:#1c1f24;--soft:#59616e;--grid:#e4e7ec;--axis:#8a93a0;--card:#f7f8fa;
--c0:#0b62c4;--c1:#c04a18;--c2:#1b7f4d;--c3:#8a3fb0;--c4:#a87400;--c5:#00808f;--c6:#c22f63;--c7:#5d6a1f}
@media (prefers-color-scheme:dark){:root{--bg:#14171c;--fg:#e6e9ee;--soft:#a3adba;--grid:#2a3038;--axis:#707a88;
--card:#1b1f26;--c0:#6cb0ff;--c1:#ff9a68;--c2:#5fcf95;--c3:#cf97f0;--c4:#e6b84d;--c5:#55d0de;--c6:#ff86ac;--c7:#bccb6c}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .3em}
h2{font-size:1.25rem;margin:2.2em 0 .6em;padding-top:.6em;border-top:1px solid var(--grid)}
h3{font-size:1rem;margin:0 0 .5em}
p{margin:.5em 0}
.lead,figcaption{color:var(--soft)}
"""


def document(title: str, style: str, main: str, scripts: str = "") -> str:
    """A whole HTML page.

    Args:
        title: Of the window.
        style: CSS beside `STYLE`.
        main: What the page shows, as HTML.
        scripts: Elements after it, each ending its line.
    """
    return frame(title, f"<style>{STYLE}{style}</style>\n", f"<main>\n{main}\n</main>\n{scripts}")


def frame(title: str, head: str, body: str) -> str:
    """What is the same in every page.

    Args:
        title: Of the window.
        head: Elements for styles and scripts, each ending its line.
        body: The page, ending its last line.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
{head}</head>
<body>
{body}</body>
</html>
"""
