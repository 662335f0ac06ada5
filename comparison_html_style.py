"""The style sheet of report.html. Colours stand at the top, once for light and once for dark.

Lines are Okabe and Ito's palette, which the colour-blind can tell apart, lightened for a dark page; names in these
colours are darkened or lightened until their contrast is at least 4.5 to 1.
"""

LINES_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4a5361")
NAMES_LIGHT = ("#00639b", "#ad4c00", "#00735a", "#9e4a79", "#875d00", "#1f6f9f", "#4a5361")
LINES_DARK = ("#4aa8e0", "#ff8a3d", "#2fc39a", "#e39ac4", "#f0b33c", "#9ad6f7", "#b9c1cc")
NAMES_DARK = LINES_DARK


def variables(lines, names):
    return "".join(f"--l{index}:{line};--n{index}:{name};"
                   for index, (line, name) in enumerate(zip(lines, names, strict=True)))  # fmt: skip


COLORS = f"""
:root{{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--ink:#1c2430;--soft:#5a6573;--rule:#dfe3e8;--grid:#e8ebef;
--accent:#00639b;--good:#00735a;--warn:#8a5a00;--bad:#a8322a;--tint:#f1f4f7;{variables(LINES_LIGHT, NAMES_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--page:#14171c;--card:#1a1e25;--ink:#e6e9ee;--soft:#a2acb9;--rule:#2e3540;
--grid:#29303a;--accent:#7cc4ef;--good:#4fd0a8;--warn:#f0b95a;--bad:#ff8f85;--tint:#20262f;
{variables(LINES_DARK, NAMES_DARK)}}}}}
"""
LAYOUT = """
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:44px 0 10px}
h2.title{font-size:1.05rem;color:var(--soft);font-weight:600;margin:22px 0 8px}
h3{font-size:1rem;margin:22px 0 6px}
h4{font-size:.92rem;margin:14px 0 4px}
p{margin:6px 0 10px;max-width:76ch;overflow-wrap:anywhere}
.lead,.small{color:var(--soft)}
.small,footer,figcaption{font-size:.85rem}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:2px}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;padding:8px 0;border-bottom:1px solid var(--rule);font-size:.92rem}
.verdict{background:var(--card);border:1px solid var(--rule);border-left:4px solid var(--accent);border-radius:6px;
padding:8px 18px;max-width:860px}
dl{margin:4px 0 12px}
dl>div{display:grid;grid-template-columns:minmax(130px,260px) 1fr;
gap:2px 18px;padding:5px 0;border-bottom:1px solid var(--rule)}
dt{font-weight:600}
dt:only-child{grid-column:1/-1;font-weight:400}
dd{margin:0;overflow-wrap:anywhere}
dt{overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px;background:var(--card);margin:8px 0 12px}
table{border-collapse:separate;border-spacing:0;font-size:.88rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:7px 12px;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule);white-space:nowrap}
tbody tr:last-child td{border-bottom:0}
th{background:var(--tint);font-weight:600}
.num{text-align:right}
small{color:var(--soft)}
table.wordy td{white-space:normal;min-width:7.5em;overflow-wrap:break-word}
table.wordy td:first-child{min-width:5em}
table.ranking td:nth-child(2),table.ranking th:nth-child(2),
table.evals td:nth-child(2),table.evals th:nth-child(2){position:sticky;left:0;background:var(--card);z-index:1;
max-width:16em;white-space:normal;min-width:8.5em;overflow-wrap:anywhere}
table.ranking th:nth-child(2),table.evals th:nth-child(2){background:var(--tint)}
table.ranking td:nth-child(4){white-space:normal;min-width:10em}
table.ranking tbody tr:first-child td{font-weight:600}
table.pairs td:nth-child(-n+2){white-space:normal;min-width:10.5em;max-width:17em;overflow-wrap:anywhere}
.badge{display:inline-block;padding:0 8px;border-radius:10px;font-size:.8rem;line-height:1.6;white-space:nowrap;
background:var(--tint);color:var(--soft)}
.separable{color:var(--good)}
.careful{color:var(--warn)}
.void,.ranked-apart{color:var(--bad)}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
details{border:1px solid var(--rule);border-radius:6px;background:var(--card);margin:8px 0;padding:0 14px}
summary{cursor:pointer;padding:9px 0;font-weight:600;overflow-wrap:anywhere}
details[open]{padding-bottom:10px}
footer{margin-top:50px;color:var(--soft);border-top:1px solid var(--rule)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
figure{margin:0;background:var(--card);
border:1px solid var(--rule);border-radius:6px;padding:10px 8px 6px;max-width:560px}
figure>svg{display:block;width:100%;height:auto}
@media (min-width:900px){table.ranking td:nth-child(2){min-width:13em}}
@media (max-width:600px){main{padding:18px 14px 40px}dl>div{grid-template-columns:1fr}h1{font-size:1.35rem}
th,td{padding:6px 9px}}
@media print{details>*{display:block}nav{display:none}}
"""
CHARTS = """
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--soft)}
svg .t{font-size:12px;fill:var(--ink)}
svg .n{font-size:11px;font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg .g{stroke:var(--grid)}
svg .a{stroke:var(--soft);stroke-opacity:.6}
svg .m{stroke:var(--soft);stroke-dasharray:2 4}
svg .l{fill:none;stroke-width:1.9;stroke-linejoin:round}
svg .k{fill:none;stroke-width:1;stroke-opacity:.45}
svg .b{stroke:none;fill-opacity:.16}
svg .f{fill:none;stroke:var(--soft);stroke-width:1.3;stroke-dasharray:5 3}
svg .p{fill:var(--card);stroke-width:2}
svg .l.d1{stroke-dasharray:7 3}
svg .l.d2{stroke-dasharray:2 3}
"""


def color_rules():
    rules = ""
    for index in range(len(LINES_LIGHT)):
        rules += f"svg .l.c{index},svg .k.c{index},svg .p.c{index}{{stroke:var(--l{index})}}"
        rules += f"svg .b.c{index},svg .on.c{index}{{fill:var(--l{index})}}svg .n.c{index}{{fill:var(--n{index})}}"
    return rules


STYLE = COLORS + LAYOUT + CHARTS + color_rules()
