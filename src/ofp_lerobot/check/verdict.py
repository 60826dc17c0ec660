"""The verdict in words, from stated thresholds."""

from typing import Any, NamedTuple

from ..objectives.monitor import HEALTHY_STD_RATIO

# Design notes: the size of one-step samples against the data's leaves [.7, 1.4] under over-guidance and nowhere else
# shows it; the same band is held against the spread over noises, which falls under mode averaging and dropping. "As
# good" allows a fifth more squared error, the notes' bar for two steps against ten.
THRESHOLDS = {
    "std_ratio": list(HEALTHY_STD_RATIO),
    "spread_ratio": list(HEALTHY_STD_RATIO),
    "error_ratio": round(1.2**0.5, 3),
    "telling_spread": 0.05,  # below this share of the demonstrations' deviation a spread says nothing
}
_WORDS = {"one": "one step", "two": "two steps"}


class Verdict(NamedTuple):
    """label: as_good, worse, undecided, collapsed, scattered, over_guided, wrong_size or not_following."""

    about: str
    label: str
    text: str


def judge(result: dict[str, Any]) -> list[dict[str, str]]:
    """Verdicts on the network at ten steps (only where it does not follow the data), at one and at two."""
    policy = _not_following(result)
    return [v._asdict() for v in [*policy, *(_judge_few(result, way) for way in _WORDS)]]


def _not_following(result: dict[str, Any]) -> list[Verdict]:
    """Against the best constant action: worse than it is no sign of having learnt these demonstrations."""
    error, constant = result["normalised"]["ten"]["error"], result["demonstrations"]["constant_error"]
    if error < constant:
        return []
    text = (
        f"ten steps do not follow these demonstrations: their error {error:.3g} is no smaller than that of always "
        f"giving the mean action, {constant:.3g}. Comparing one step with them says little: check cameras, dataset "
        "and statistics, or train longer"
    )
    return [Verdict("ten", "not_following", text)]


def _judge_few(result: dict[str, Any], way: str) -> Verdict:
    few, ten = result["normalised"][way], result["normalised"]["ten"]
    ratio, spread = result["ratios_to_ten"][way]["error"], result["ratios_to_ten"][way]["spread"]["value"]
    is_, have = ("is", "has") if way == "one" else ("are", "have")
    words = _WORDS[way]
    (low, high), (thin, wide) = THRESHOLDS["std_ratio"], THRESHOLDS["spread_ratio"]
    telling = max(few["spread"], ten["spread"]) >= THRESHOLDS["telling_spread"] * result["demonstrations"]["std"]
    numbers = f"error ratio {_interval(ratio)} (paired bootstrap over {_counted(result)})"
    if few["std_ratio"] > high and ten["std_ratio"] > high:
        text = (
            f"{words} and ten both give actions far wider than the demonstrations ({few['std_ratio']:.2f} and "
            f"{ten['std_ratio']:.2f} times their deviation, healthy {low} to {high}): training diverged, or the "
            "statistics belong to other data"
        )
        return Verdict(way, "wrong_size", text)
    if few["std_ratio"] > high:
        text = (
            f"over-guided: with {words} the actions have {few['std_ratio']:.2f} times the demonstrations' deviation "
            f"(healthy {low} to {high}), with ten {ten['std_ratio']:.2f}: train with a lower --policy.guidance_weight"
        )
        return Verdict(way, "over_guided", text)
    if telling and spread < thin:
        text = (
            f"{words} {have} collapsed: spread {spread:.2f} of ten steps' (healthy {thin} to {wide}). Answers near the "
            f"mean of several ways can have a low error and still fail; {numbers}"
        )
        return Verdict(way, "collapsed", text)
    if telling and spread > wide:
        text = (
            f"{words} {is_} noisier than ten: spread {spread:.2f} of ten steps' (healthy {thin} to {wide}); {numbers}. "
            "Train longer, or raise --policy.consistency_weight"
        )
        return Verdict(way, "scattered", text)
    tail = f"spread {spread:.2f} of ten steps'" if telling else "ten steps hardly vary here, so the spread cannot tell"
    if ratio["high"] <= THRESHOLDS["error_ratio"]:
        return Verdict(way, "as_good", f"{words} {is_} as good as ten on this data: {numbers}, {tail}")
    if ratio["low"] > THRESHOLDS["error_ratio"]:
        return Verdict(way, "worse", f"{words} {is_} worse than ten on this data: {numbers}, {tail}")
    text = (
        f"{words}: not decided, {numbers} reaches across {THRESHOLDS['error_ratio']}: check more --frames or "
        f"--episodes; {tail}"
    )
    return Verdict(way, "undecided", text)


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _counted(result: dict[str, Any]) -> str:
    frames, episodes = len(result["data"]["frames"]), len(result["data"]["episodes"])
    return f"{episodes} episodes" if result["bootstrap"] == "episodes" else f"{frames} frames"


def limits(result: dict[str, Any]) -> list[str]:
    """What the numbers cannot say, for this run."""
    told = [
        "Open-loop error is not success: on a robot errors add up, and the mean of several good answers has a low "
        "error though it may be none of them. Read error and spread together, then try it.",
        "Ten steps means the same weights: what training did to them shows by checking the starting checkpoint too.",
    ]
    if result["bootstrap"] == "frames":
        told.append("Frames of one episode are alike, so the intervals are too narrow: check 8 episodes or more.")
    if result["data"]["held_out"] is False:
        told.append(
            "NOT held out: training used some of these episodes. Train with --dataset.eval_split=0.1 to keep some out."
        )
    if result["data"]["held_out"] is None:
        told.append("The checkpoint does not say whether training used these episodes.")
    successive = result["successive"]
    if successive and "one_warm" in successive:
        told.append("Warm start can hide a broken one-step map: judge the rows without it.")
    return told
