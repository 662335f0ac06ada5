"""Charts as inline SVG: lines with bands, points with a front, intervals. Standard library only.

    line_chart([Series('1 llama', 0, x, y, low, high)], 'tokens', 'loss', y_limits=(1.8, 3))

Every chart is drawn for a place about 400 pixels wide, so that its letters are as large on a phone as on a desk.
Colours are classes (`c0`, `c1`, ...) that the page's style sheet gives, once for light and once for dark.
"""

import html
import math
from dataclasses import dataclass, field

WIDTH, HEIGHT = 380, 270
LEFT, TOP, BOTTOM = 54, 12, 44
LABEL_ROOM = 106  # to the right of the lines, for their names; up to MOST_ROOM where they are long
MOST_ROOM = 156
GROUP_ROOM = 130  # for the name of a group, which stands aslant below the lines
N_COLORS = 7
LETTER = 7.7  # pixels a letter of a label takes


@dataclass
class Series:
    """One line: its name, the index of its colour, and its points; band and dots (measured points) are optional."""

    name: str
    color: int
    x: list
    y: list
    low: list = field(default_factory=list)
    high: list = field(default_factory=list)
    dots: list = field(default_factory=list)


# -- scales


@dataclass
class Scale:
    """Maps values to pixels, straight or in their logarithm."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value):
        low, high = self._of(self.low), self._of(self.high)
        part = (self._of(value) - low) / ((high - low) or 1)
        return self.start + part * (self.end - self.start)

    def _of(self, value):
        return math.log10(value) if self.is_log else value

    def ticks(self, n=5):
        return log_ticks(self.low, self.high, n) if self.is_log else even_ticks(self.low, self.high, n)


def even_ticks(low, high, n=5):
    """Round numbers, 1, 2 or 5 times a power of ten apart, about n of them."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high, n=5):
    """Powers of ten, with 2 and 5 between them where they are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in decades for factor in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / (n + 2))]
    return ticks if len(ticks) > 1 else [low, high]


def padded(values, part=0.06):
    """(low, high) a little beyond the values."""
    low, high = min(values), max(values)
    margin = part * (high - low) or abs(low) * 0.05 or 1
    return low - margin, high + margin


def padded_log(values):
    """(low, high) beyond positive values by the same ratio on both sides."""
    low, high = min(values), max(values)
    ratio = max(1.15, (high / low) ** 0.08)
    return low / ratio, high * ratio


def plain_number(value, digits=3):
    """A tick's text: so many digits, k, M, G and so on from ten thousand, a power of ten below a thousandth."""
    if value == 0:
        return "0"
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9999 and (suffix != "k" or abs(value) >= 9999):
            return f"{value / size:.{digits}g}{suffix}"
    return f"{value:.{digits + 1}g}"


def tokens_number(value, digits=3):
    return plain_number(value, digits).replace("G", "B")


def tick_texts(ticks, text):
    """The texts of all ticks, with as many digits as it takes to tell them apart."""
    for digits in range(3, 10):
        texts = [text(tick, digits) for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts


# -- pieces


def number(value):
    return f"{value:.1f}"


def element(name, content="", **attributes):
    """<name ...>content</name>; underscores of attribute names become dashes, and `class_` is class."""
    pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                    for key, value in attributes.items())  # fmt: skip
    return f"<{name}{pairs}>{content}</{name}>" if content else f"<{name}{pairs}/>"


def text(x, y, content, **attributes):
    return element("text", html.escape(content), x=number(x), y=number(y), **attributes)


def cut(name, room=LABEL_ROOM):
    """A name that fits into so many pixels, cut in the middle: its end often tells two apart."""
    letters = int(room / LETTER)
    if len(name) <= letters:
        return name
    return name[: letters - letters // 3 - 1] + "…" + name[len(name) - letters // 3 :]


def axes(x_scale, y_scale, x_label, y_label, x_text, y_text):
    """Grid, ticks and labels."""
    bottom, x_ticks = y_scale.start, x_scale.ticks(4)
    parts = [y_axis(x_scale, y_scale, y_label, y_text)]
    for tick, said in zip(x_ticks, tick_texts(x_ticks, x_text), strict=True):
        x = x_scale(tick)
        parts.append(element("line", x1=number(x), x2=number(x), y1=number(bottom), y2=number(bottom + 4), class_="a"))
        parts.append(text(x, bottom + 16, said, text_anchor="middle"))
    parts.append(text((x_scale.start + x_scale.end) / 2, bottom + 36, x_label, text_anchor="middle", class_="t"))
    return "".join(parts)


def y_axis(x_scale, y_scale, y_label, y_text):
    """The horizontal grid with its numbers and label, and the line at the bottom."""
    right, bottom, parts = x_scale.end, y_scale.start, []
    y_ticks = y_scale.ticks(5)
    for tick, said in zip(y_ticks, tick_texts(y_ticks, y_text), strict=True):
        y = y_scale(tick)
        parts.append(
            element("line", x1=number(x_scale.start), x2=number(right), y1=number(y), y2=number(y), class_="g")
        )
        parts.append(text(x_scale.start - 6, y + 3.5, said, text_anchor="end"))
    parts.append(element("line", x1=number(x_scale.start), x2=number(right), y1=number(bottom), y2=number(bottom),
                         class_="a"))  # fmt: skip
    middle = (y_scale.start + y_scale.end) / 2
    parts.append(text(12, middle, y_label, text_anchor="middle", class_="t", transform=f"rotate(-90 12 {middle:.1f})"))
    return "".join(parts)


def spread_out(places, gap=13, low=TOP + 4, high=HEIGHT - BOTTOM + 2):
    """The wanted heights, moved apart so that no two labels are closer than `gap`, in their order."""
    order = sorted(range(len(places)), key=places.__getitem__)
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    moved, before = list(places), -math.inf
    for index in order:
        moved[index] = before = max(min(max(places[index], low), high), before + gap)
    after = math.inf
    for index in reversed(order):  # what was pushed out at the bottom goes back up
        moved[index] = after = min(moved[index], high if after is math.inf else after - gap)
    return moved


def picture(content, title, height=HEIGHT):
    heading = element("title", html.escape(title))
    return element("svg", heading + content, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)


def path_of(x_scale, y_scale, points):
    return "M" + "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in points)


def color_class(index):
    """c0 to c6, then the same dashed and dotted."""
    return f"c{index % N_COLORS} d{index // N_COLORS % 3}"


# -- charts


def room_for(series):
    """Pixels to the right of the lines for their names; a single line has none."""
    if len(series) < 2:
        return 24
    return min(MOST_ROOM, max(LABEL_ROOM, 14 + LETTER * max(len(each.name) for each in series)))


def line_chart(series, x_label, y_label, y_limits, title, is_log=False, x_text=plain_number, marker=None):
    """Lines named at their right ends, a single one by the title alone. `marker` is a y that is marked, as a target."""
    right = WIDTH - room_for(series)
    values = [x for each in series for x in each.x if not is_log or x > 0]
    low, high = (min(values, default=1), max(values, default=1)) if is_log else (0, max(values))
    x_scale = Scale(low, high, LEFT, right, is_log and high > low)
    y_scale = Scale(*y_limits, HEIGHT - BOTTOM, TOP)
    body = "".join(line_with_band(each, x_scale, y_scale) for each in series)
    if marker is not None and y_limits[0] <= marker <= y_limits[1]:
        y = number(y_scale(marker))
        body += element("line", x1=LEFT, x2=number(right), y1=y, y2=y, class_="m")
    box = LEFT, TOP - 4, right - LEFT + 3, HEIGHT - BOTTOM - TOP + 5
    inside = dict(zip(("x", "y", "width", "height"), box, strict=True))  # an inner svg cuts off what lies outside it
    drawn = axes(x_scale, y_scale, x_label, y_label, x_text, plain_number)
    drawn += element("svg", body, **inside, viewBox=" ".join(map(str, box))) + end_labels(series, x_scale, y_scale)
    return picture(drawn, title)


def line_with_band(series, x_scale, y_scale):
    usable = [index for index, x in enumerate(series.x) if not x_scale.is_log or x > 0]
    points = [(series.x[index], series.y[index]) for index in usable]
    if not points:
        return ""
    drawn, color = "", color_class(series.color)
    if series.low and series.low != series.high:
        there = [(series.x[index], series.high[index]) for index in usable]
        back = [(series.x[index], series.low[index]) for index in reversed(usable)]
        drawn += element("path", d=path_of(x_scale, y_scale, there + back) + "Z", class_=f"b {color}")
    drawn += element("path", d=path_of(x_scale, y_scale, points), class_=f"l {color}")
    for x, y in series.dots or points[: len(points) == 1]:  # a line of one point would be invisible
        drawn += element("circle", cx=number(x_scale(x)), cy=number(y_scale(y)), r=3.5, class_=f"p on {color}")
    return drawn


def end_labels(series, x_scale, y_scale):
    """Names at the right, moved apart, each with a thin line to its curve's end; none where there is one curve."""
    ends = [(each, y_scale(min(max(each.y[-1], y_scale.low), y_scale.high))) for each in series if each.y]
    drawn, right = "", x_scale.end
    for (each, y), place in zip(ends, spread_out([y for _, y in ends]), strict=True):
        color = color_class(each.color)
        path = f"M{x_scale(each.x[-1]) + 2:.1f} {y:.1f}L{right + 8:.1f} {place:.1f}"
        drawn += element("path", d=path, class_=f"k {color}")
        drawn += text(right + 11, place + 3.5, cut(each.name, WIDTH - right - 12), class_=f"n {color}")
    return drawn if len(series) > 1 else ""


def group_chart(series, groups, x_label, y_label, y_limits, title):
    """Lines over named groups; x of the series are indices into them. Names of groups stand aslant."""
    right, bottom = WIDTH - room_for(series), HEIGHT - BOTTOM
    x_scale = Scale(-0.3, len(groups) - 0.7, LEFT, right)
    y_scale = Scale(*y_limits, bottom, TOP)
    drawn, names = y_axis(x_scale, y_scale, y_label, plain_number), [cut(name, GROUP_ROOM) for name in groups]
    for index, name in enumerate(names):
        x = x_scale(index)
        drawn += element("line", x1=number(x), x2=number(x), y1=number(bottom), y2=number(bottom + 4), class_="a")
        turn = f"rotate(-35 {number(x)} {number(bottom + 14)})"
        drawn += text(x + 3, bottom + 14, name, text_anchor="end", transform=turn)
    room = 26 + 0.57 * LETTER * max(map(len, names))  # 0.57 is the sine of 35 degrees
    drawn += text((LEFT + right) / 2, bottom + room + 8, x_label, text_anchor="middle", class_="t")
    drawn += "".join(line_with_band(each, x_scale, y_scale) for each in series)
    return picture(drawn + end_labels(series, x_scale, y_scale), title, round(bottom + room + 18))


def scatter_chart(points, front, x_label, y_label, title, x_text=plain_number):
    """Points (x, y, name, colour), with their names; those at the indices in `front` are filled and joined in steps."""
    costs = [x for x, *_ in points]
    is_log = max(costs) > 5 * min(costs)
    x_scale = Scale(*(padded_log(costs) if is_log else padded(costs, 0.15)), LEFT, WIDTH - 14, is_log)
    y_scale = Scale(*padded([y for _, y, *_ in points], 0.12), HEIGHT - BOTTOM, TOP)
    drawn = axes(x_scale, y_scale, x_label, y_label, x_text, plain_number)
    corners = []
    for index in front:
        x, y = points[index][:2]
        corners += [(x, corners[-1][1])] if corners else []
        corners.append((x, y))
    if len(corners) > 1:
        drawn += element("path", d=path_of(x_scale, y_scale, corners), class_="f")
    for index in sorted(range(len(points)), key=lambda index: index in front):  # the front on top
        x, y, name, color = points[index]
        kind = "p on" if index in front else "p"
        inside = element("title", html.escape(f"{name}: {x_text(x)}, {y:.4f}"))
        drawn += element("circle", inside, cx=number(x_scale(x)), cy=number(y_scale(y)), r=5,
                         class_=f"{kind} {color_class(color)}")  # fmt: skip
    return picture(drawn + point_labels(points, x_scale, y_scale), title)


def point_labels(points, x_scale, y_scale):
    """Names beside the points, on the side where there is room, moved apart where they would meet."""
    taken = [(x_scale(x) - 6, y_scale(y) - 6, x_scale(x) + 6, y_scale(y) + 6) for x, y, *_ in points]
    drawn = ""
    for x, y, name, color in points:
        name = cut(name, 118)
        box = free_box(x_scale(x), y_scale(y), len(name) * LETTER, taken)
        if box is None:
            continue
        taken.append(box)
        drawn += text(box[0], box[3] - 3, name, class_=f"n {color_class(color)}")
    return drawn


def free_box(x, y, width, taken):
    """The first place around a point that is inside the picture and on nobody; None leaves the name to the tooltip."""
    for dx, dy in ((9, -6), (-9 - width, -6), (-width / 2, -20), (-width / 2, 8), (9, -18), (-9 - width, 6), (9, 7)):
        box = (x + dx, y + dy, x + dx + width, y + dy + 13)
        is_inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= TOP - 8 and box[3] <= HEIGHT - BOTTOM + 2
        if is_inside and not any(overlap(box, other) for other in taken):
            return box
    return None


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def interval_chart(rows, x_label, title):
    """Rows (name, middle, half width or None, colour) under each other, with a line at zero."""
    height = TOP + 26 * len(rows) + BOTTOM
    left = min(180, 20 + LETTER * max(len(name) for name, *_ in rows))
    ends = [middle + side * (half or 0) for _, middle, half, _ in rows for side in (-1, 1)]
    x_scale = Scale(*padded([*ends, 0.0]), left, WIDTH - 14)
    bottom = height - BOTTOM
    drawn = ""
    for tick in x_scale.ticks(4):
        x = number(x_scale(tick))
        drawn += element("line", x1=x, x2=x, y1=TOP, y2=bottom, class_="a" if abs(tick) < 1e-12 else "g")
        drawn += text(x_scale(tick), bottom + 16, f"{tick:+.3g}" if abs(tick) > 1e-12 else "0", text_anchor="middle")
    for index, (name, middle, half, color) in enumerate(rows):
        y = TOP + 26 * index + 13
        drawn += text(left - 8, y + 3.5, cut(name, left - 12), text_anchor="end", class_=f"n {color_class(color)}")
        if half is not None:
            path = path_of(x_scale, lambda value, y=y: y, [(middle - half, 0), (middle + half, 0)])
            drawn += element("path", d=path, class_=f"l {color_class(color)}")
        drawn += element("circle", cx=number(x_scale(middle)), cy=y, r=4, class_=f"p on {color_class(color)}")
    drawn += text(WIDTH / 2, bottom + 34, x_label, text_anchor="middle", class_="t")
    return picture(drawn, title, height)
