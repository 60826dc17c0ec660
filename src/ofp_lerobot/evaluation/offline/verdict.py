"""The verdict in words, from stated thresholds."""

from typing import Any, NamedTuple

from lerobot.utils.constants import ACTION

from ...objectives import OBJECTIVES
from ...objectives.monitor import HEALTHY_STD_RATIO
from ...policies.normalisation import FAR

# Design notes: the size of one-step samples against the data's leaves [.7, 1.4] under over-guidance and nowhere else
# shows it; the same band is held against the spread over noises, which falls under mode averaging and dropping. "As
# good" allows a fifth more squared error, the notes' bar for two steps against ten.
THRESHOLDS = {
    "std_ratio": list(HEALTHY_STD_RATIO),
    "spread_ratio": list(HEALTHY_STD_RATIO),
    "error_ratio": round(1.2**0.5, 3),
    "telling_spread": 0.05,  # below this share of the demonstrations' deviation a spread says nothing
    "sharpness": round(1.2**0.5, 3),  # of the ratios of `measure.sharpness`, a fifth in squares here too
}


class Verdict(NamedTuple):
    """label: as_good, worse, undecided, collapsed, scattered, over_guided, wrong_size, not_telling, not_following or
    other_statistics. Of sharpness: too_sharp or too_spread.
    """

    about: str
    label: str
    text: str


def judge(result: dict[str, Any]) -> list[dict[str, str]]:
    """Verdicts on the statistics and on ten steps, only where they do not fit the data, and on one and two steps.

    One step is never as good as ten where one of the first two is there: then ten steps are no measure.
    """
    first = [*_other_statistics(result), *_not_following(result)]
    return [
        v._asdict() for v in [*first, *(_judge_few(result, variant, telling=not first) for variant in ("one", "two"))]
    ]


def _other_statistics(result: dict[str, Any]) -> list[Verdict]:
    """Dimensions of which half of the values are far outside once normalised."""
    described = [
        f"{key}[{i}] (median size {size:.3g})"
        for key, far in result["demonstrations"].get("far", {}).items()
        for i, size in far.items()
    ]
    if not described:
        return []
    text = (
        f"the checkpoint's statistics are not of this data: normalised, most values should be within ±1, but half of "
        f"them are beyond {FAR:g} in {', '.join(described)}. Check on the dataset that it was trained on, in the same "
        "units"
    )
    return [Verdict("statistics", "other_statistics", text)]


def _not_following(result: dict[str, Any]) -> list[Verdict]:
    """Against the best constant action: worse than it is no sign of having learnt these demonstrations.

    All dimensions together, then each: one that is not followed, such as a gripper, hides among those that are.
    """
    error, constant = result["normalised"]["ten"]["error"], result["demonstrations"]["constant_error"]
    if error < constant:
        alone = [
            f"{name}, where their mean answer's error {each['error']:.3g} is no smaller than {each['constant']:.3g}"
            for name, each in _unfollowed(result).items()
        ]
        if not alone:
            return []
        text = (
            f"ten steps do not follow these demonstrations in {' and '.join(alone)}, that of always giving the mean "
            "action. Comparing one step with them says nothing about that: check the statistics, or train longer"
        )
        return [Verdict("ten", "not_following", text)]
    text = (
        f"ten steps do not follow these demonstrations: their error {error:.3g} is no smaller than that of always "
        f"giving the mean action, {constant:.3g}. Comparing one step with them says little: check cameras, dataset "
        "and statistics, or train longer"
    )
    return [Verdict("ten", "not_following", text)]


def _unfollowed(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """`measure.follow_each` of the dimensions that ten steps do not follow, under the names that a reader knows."""
    names = result["per_dimension"]["names"]
    return {f"{ACTION}[{i}] ({names[i]})": each for i, each in result["demonstrations"]["unfollowed"].items()}


def _sharpening(result: dict[str, Any]) -> float:
    """The noise of the sharpening that the checkpoint was trained with, 0 where it was not."""
    checkpoint = result["checkpoint"]
    return float(checkpoint["sharpening_noise"]) if checkpoint["objective"] == "ofp" else 0.0


MOST_NOISE = 0.5  # more narrows answers towards their mean


def judge_sharpness(result: dict[str, Any]) -> list[dict[str, str]]:
    """Whether one step is too sharp or too spread for its data and what to change; nothing where neither is certain."""
    found, limit = result["sharpness"], THRESHOLDS["sharpness"]
    spread, nearest = found["spread"], found["nearest"]
    if result["normalised"]["one"]["spread"] < THRESHOLDS["telling_spread"] * result["demonstrations"]["std"]:
        return []
    noise = _sharpening(result)
    sharpens = result["checkpoint"]["objective"] == "ofp" and noise + 0.2 <= MOST_NOISE
    raised = f"raise --policy.sharpening_noise from {noise:g} to {noise + 0.2:g}"
    raise_it = f", or {raised} and train on" if sharpens else ""
    if spread["low"] > limit:
        text = (
            f"one step is too spread: its answers vary {spread['value']:.2f} [{spread['low']:.2f}, "
            f"{spread['high']:.2f}] times as much as the demonstrations around them (healthy to {limit}): train "
            f"longer{raise_it}"
        )
        return [Verdict("one", "too_spread", text)._asdict()]
    if nearest["low"] > limit:
        lowered = f"lower --policy.sharpening_noise, which was {noise:g}"
        change = lowered if noise else "train longer, or with more demonstrations"
        text = (
            f"one step is too sharp: its answers are {nearest['value']:.2f} [{nearest['low']:.2f}, "
            f"{nearest['high']:.2f}] times as far from ten steps' answers as those from one another (healthy to "
            f"{limit}), so they lie between the ways that the demonstrations take: {change}"
        )
        return [Verdict("one", "too_sharp", text)._asdict()]
    return []


def _narrowed_by_sharpening(result: dict[str, Any]) -> bool:
    """Whether one step varies less than ten because training sharpened it, which narrows each way of acting on purpose.

    Then its answers surely lie where ten steps' do, and leave none of theirs out.
    """
    if not _sharpening(result):
        return False
    found = result["sharpness"]
    return max(found["nearest"]["high"], found["covered"]["high"]) <= THRESHOLDS["sharpness"]


def _judge_few(result: dict[str, Any], variant: str, telling: bool) -> Verdict:
    """The first rule that applies: size of the actions, spread over noises, error.

    telling: whether ten steps are worth comparing with.
    """
    few, ten = result["normalised"][variant], result["normalised"]["ten"]
    error, spread = (result["ratios_to_ten"][variant][name] for name in ("error", "spread"))
    words, is_, has = ("one step", "is", "has") if variant == "one" else ("two steps", "are", "have")
    (low, high), (thin, wide), allowed = (THRESHOLDS[n] for n in ("std_ratio", "spread_ratio", "error_ratio"))
    varied = max(few["spread"], ten["spread"]) >= THRESHOLDS["telling_spread"] * result["demonstrations"]["std"]
    numbers = (
        f"error ratio {error['value']:.2f} [{error['low']:.2f}, {error['high']:.2f}] "
        f"(paired bootstrap over {result['bootstrap']['count']} {result['bootstrap']['unit']})"
    )
    sizes = (
        f"{few['std_ratio']:.2f} times the demonstrations' deviation, with ten {ten['std_ratio']:.2f} "
        f"(healthy {low} to {high})"
    )
    spreads = f"spread {spread['value']:.2f} of ten steps'"
    narrowed = variant == "one" and varied and spread["value"] < thin and _narrowed_by_sharpening(result)
    if narrowed:
        spreads += f", in all of their ways: sharpening_noise={_sharpening(result):g} narrows"
    tail = f"{numbers}, {spreads if varied else 'ten steps hardly vary here, so the spread cannot tell'}"
    unfollowed = _unfollowed(result)
    among = f" in {' and '.join(unfollowed)}" if unfollowed else ""
    rules = (
        (
            few["std_ratio"] > high and ten["std_ratio"] > high,
            "wrong_size",
            f"{words}: the actions have {sizes}: training diverged, or the statistics belong to other data",
        ),
        (
            few["std_ratio"] > high,
            "over_guided",
            f"over-guided: with {words} the actions have {sizes}: lower "
            "--policy.consistency_weight, with objective=ofp_paper --policy.ofp_paper.guidance_weight, and train again",
        ),
        (
            varied and spread["value"] < thin and not narrowed,
            "collapsed",
            f"{words} {has} collapsed: {spreads} (healthy {thin} to {wide}). Answers near the mean of several ways can "
            f"have a low error and still fail; {numbers}",
        ),
        (
            few["std_ratio"] < low <= ten["std_ratio"],
            "collapsed",
            f"{words} {has} collapsed: the actions have {sizes}; {numbers}",
        ),
        (
            varied and spread["value"] > wide,
            "scattered",
            f"{words} {is_} noisier than ten: {spreads} (healthy {thin} to {wide}); {numbers}. Train longer",
        ),
        (
            error["high"] <= allowed and not telling,
            "not_telling",
            f"{words}: no worse than ten, which do not follow this data{among} either, so nothing is shown: {tail}",
        ),
        (error["high"] <= allowed, "as_good", f"{words} {is_} as good as ten on this data: {tail}"),
        (error["low"] > allowed, "worse", f"{words} {is_} worse than ten on this data: {tail}"),
        (True, "undecided", f"{words}: not decided, check more frames or episodes (bar {allowed}): {tail}"),
    )
    return next(Verdict(variant, label, text) for applies, label, text in rules if applies)


def limits(result: dict[str, Any]) -> list[str]:
    """What the numbers cannot say, for this run."""
    notes = [
        "Open-loop error is not success: on a robot errors add up, and the mean of several good answers has a low "
        "error though it may be none of them. Read error and spread together, then try it.",
        "Ten steps means the same weights: what training did to them shows by checking the starting checkpoint too.",
    ]
    asked = result["checkpoint"]
    if asked["silent_branch"]:
        notes.append(
            "One step has not been trained: the checkpoint's target-time branch is silent, so its one step is a single "
            "step of flow matching. Train it, then check again."
        )
    elif asked["objective"] and OBJECTIVES[asked["objective"]].uses_target_time and asked["sampler"] == "euler":
        notes.append(
            f"The checkpoint's config.json says sampler=euler, num_inference_steps={asked['num_inference_steps']}. "
            "Commands act in that way, which is not the one step judged here. Change config.json to flow_map and 1, or "
            "give LeRobot's commands --policy.sampler=flow_map --policy.num_inference_steps=1, ofp-serve --sampler "
            "flow_map --num-inference-steps 1, and ofp-compare sampler=flow_map,steps=1."
        )
    if asked["inference_precision"] == "fp8":
        notes.append(
            "Errors and spreads are those of exact products: what inference_precision=fp8 changes was not measured."
            f"{' The latency is with fp8.' if result['latency_ms'] else ''}"
        )
    if (asked["test_time_samples"], asked["noise_temperature"]) != (1, 1):
        notes.append(
            f"Single answers from full noise were measured; the checkpoint asks for test_time_samples="
            f"{asked['test_time_samples']}, noise_temperature={asked['noise_temperature']:g}."
        )
    if result["bootstrap"]["unit"] == "frames":
        notes.append("Frames of one episode are alike, so the intervals are too narrow: check 8 episodes or more.")
    notes += _describe_history(result["data"], result["checkpoint"]["source"])
    successive = result["successive"]
    if successive and "one_warm" in successive:
        notes.append("Warm start can hide a broken one-step map: judge the rows without it.")
    if result["latency_ms"]:
        notes.append(
            "Latency is this machine's for one observation, without pre- and postprocessing and with compile_model off."
        )
    return notes


def _describe_history(data: dict[str, Any], source: str) -> list[str]:
    notes = []
    if data["held_out"] is False:
        if data["seen_by"] == source:
            notes.append(
                "NOT held out: training used some of these episodes. Train with --dataset.eval_split=0.1 to keep some "
                "out."
            )
        else:
            notes.append(
                f"NOT held out: {data['seen_by']}, which training started from, was itself trained on some of these "
                "episodes."
            )
    if data["held_out"] is None:
        same = f"It was trained on {data['trained_on']}: where this is the same data, give that as --dataset."
        notes.append(
            "The checkpoint does not say whether training used these episodes."
            f"{' ' + same if data['trained_on'] else ''}"
        )
    notes += [
        f"{name}, which training started from, was trained on {dataset}: where this is the same data, they may not be "
        "held out."
        for name, dataset in data["before"].items()
    ]
    if data["unknown"] is not None:
        notes.append(f"Training started from {data['unknown']}, and what that was trained on is not known here.")
    return notes
