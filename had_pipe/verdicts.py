"""A run in plain sentences, each figure beside its floor; never more than was measured."""

from __future__ import annotations

from had_pipe.run import Row, RunRecord, measured


def aligned_groups(record: RunRecord) -> str:
    """Which k-mers the alignment is of, in words."""
    return f"{record.asked('objective', 'align_on')} k-mers"


def verdicts(record: RunRecord) -> list[str]:
    """The run in plain sentences, each figure beside its floor; never more than was measured."""
    said = []
    if record.step < record.steps:
        said.append(
            f"This run is not finished: {record.step:,} of {record.steps:,} steps so far. "
            "What follows holds for this moment."
        )
    if not record.train:
        return [*said, "Nothing has been measured yet."]
    if not record.validation:
        # Floors are measured before the first step, on what is held out.
        why = (
            "No windows were held out"
            if record.floors is None
            else "The student was not measured on held-out windows yet"
        )
        return [
            *said,
            f"{why}, so nothing here is measured on DNA the student has not seen: the figures are "
            "those of training batches.",
        ]
    last, floors = record.validation[-1], record.floors
    if floors is not None:
        said += [*_alignment(record, last, floors), *_reconstruction(last, floors)]
    said.append(
        f"Measured on {int(last['windows']):,} held-out windows after step {int(last['step']):,}."
    )
    return said


def _alignment(record: RunRecord, last: Row, floors: Row) -> list[str]:
    if not measured(last, "align") or not measured(floors, "mean_align", "kmer_align"):
        return []
    align, mean, table = last["align"], floors["mean_align"], floors["kmer_align"]
    if min(mean, table) <= 0:
        return ["The teacher's embeddings are alike for every k-mer: alignment says nothing here."]
    beyond_mean, beyond_table = 1 - align / mean, 1 - align / table
    # Only of squares is what is left a share of the variance.
    squared = record.asked("objective", "error") == "mse"
    if beyond_table <= 0:
        table_says = (
            "It does not beat the k-mer table (the mean embedding of each k-mer): its error is "
            f"{_larger(-beyond_table)}, so alignment does not show yet that it reads context."
        )
    elif squared:
        table_says = (
            f"It explains {percent(beyond_table)} of what a k-mer table (the mean embedding of "
            "each k-mer, without any context) leaves unexplained."
        )
    else:
        table_says = (
            f"It is {percent(beyond_table)} below that of a k-mer table (the mean embedding of "
            "each k-mer, without any context)."
        )
    groups = aligned_groups(record)
    if beyond_mean <= 0:
        mean_says = (
            "The student does not yet explain the teacher's embeddings better than their plain "
            f"mean does: its error is {_larger(-beyond_mean)}."
        )
    elif squared:
        mean_says = (
            f"The student explains {percent(beyond_mean)} of the variance of the teacher's "
            f"embeddings on {groups}."
        )
    else:
        mean_says = (
            f"The student's error against the teacher's embeddings on {groups} is "
            f"{percent(beyond_mean)} below that of their plain mean."
        )
    return [mean_says, table_says]


def _reconstruction(last: Row, floors: Row) -> list[str]:
    if not measured(last, "accuracy") or not measured(floors, "base_frequency_accuracy"):
        return []
    accuracy, commonest = last["accuracy"], floors["base_frequency_accuracy"]
    sentence = (
        f"Masked-base accuracy {accuracy:.3f}, against {commonest:.3f} for always naming the "
        "commonest base"
    )
    if measured(last, "reconstruct") and measured(floors, "base_frequency_cross_entropy"):
        gain = floors["base_frequency_cross_entropy"] - last["reconstruct"]
        sentence += (
            f"; cross-entropy {abs(gain):.4f} nats {'below' if gain > 0 else 'above'} that of the "
            "base frequencies"
        )
    better = accuracy > commonest
    return [sentence + ("." if better else ": masked bases are not learnt yet.")]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _larger(share: float) -> str:
    return "the same" if share < 0.0005 else f"{percent(share)} larger"
