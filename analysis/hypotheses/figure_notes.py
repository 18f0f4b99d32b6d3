"""How to read each figure of phase 1, and when it misleads."""

from analysis.report.report import ReportFigure

_ALL = (
    ReportFigure(
        "frequency_entropy",
        "Frequency and gate entropy",
        "Each dot is a token id. A cloud that falls to the right says that frequent ids are routed more surely.",
        "A rare id's mean entropy is noisy, which widens the cloud to the left without any law behind it; dots "
        "over dots hide how many there are.",
    ),
    ReportFigure(
        "entropy_distribution",
        "Distribution of gate entropy",
        "Lines: how many of the occurrences belong to ids with at most this mean entropy; a line that rises early is "
        "a sure layer. Heat map (many layers): darker where more occurrences lie. Dashed: 0.5, 1.0 and 1.5 nats.",
        "It shows means of ids, not single tokens: an id that is sure half of the time looks lukewarm.",
    ),
    ReportFigure(
        "routing_consistency",
        "Routing consistency by frequency",
        "Dots: mean consistency of a tenth of the ids, rarest to the left, with intervals. Dashed line and gray: what "
        "chance alone gives for ids as rare as these. Only the distance between the two is about routing, be it that "
        "of the id or that of its document.",
        "To the left both are high because rare ids cannot be anything else. In sample: see predictability for "
        "choices that were not seen.",
    ),
    ReportFigure(
        "token_experts",
        "First choices of the most frequent token ids",
        "A row is a token id, a column an expert; darker means chosen first more often. A row with one dark cell is a "
        "token that one expert owns.",
        "Only the most frequent ids are shown, and they are not like the rest; a dark column is a popular expert, "
        "not a rule about tokens.",
    ),
    ReportFigure(
        "fast_path_coverage",
        "Fast-path coverage",
        "Left: what each preset covers in each layer, with intervals. Right: the mean over layers for other "
        "thresholds; where neighbors differ much, the threshold decides the result.",
        "The frequency threshold is a count of this corpus: in twice the text every id is twice as frequent, and "
        "coverage rises with no change of routing.",
    ),
    ReportFigure(
        "predictability",
        "Held-out predictability by layer and order",
        "One row per figure, one column per context order. Dots with intervals: observed; dashed line and gray: what "
        "shuffled routing gives. The higher above the gray, the more the ids foretell. Dotted: the shortest order at "
        "the same tokens; what is between is what the longer context adds.",
        "Longer contexts score at fewer tokens (the coverage stands above each column), and these are the easy ones: "
        "an order that is better at its own keys need not be better over all tokens. Intervals hold the tables fixed.",
    ),
    ReportFigure(
        "choice_entropy",
        "Entropy of the first choice, given the last ids",
        "Dots: what stays open once the last n ids are known, with intervals; dashed and gray: the same keys with "
        "shuffled routing; dotted: without knowing any id. The further below the gray, the more the ids say.",
        "With few occurrences per key even the corrected entropy is biased; so compare with the gray, which has the "
        "same counts, and not with the dotted line.",
    ),
    ReportFigure(
        "repetition",
        "Repetition of the first choice",
        "Dots: share of consecutive tokens with the same first choice; dashed and gray: the same with the tokens of "
        "each document shuffled; dotted: uniform routing.",
        "Text that repeats itself repeats its routing: a token id that follows itself counts as well.",
    ),
    ReportFigure(
        "expert_load",
        "Expert load",
        "A row is a layer, a column an expert; darker means more of the layer's assignments, in multiples of the even "
        "share.",
        "Load is that of this corpus: other domains have other busy experts.",
    ),
    ReportFigure(
        "co_activation",
        "Co-activation of experts",
        "Each panel is a layer; a cell says how often two experts are chosen for the same token, over what their "
        "loads alone make expected, as the binary logarithm: +1 is twice as often, -1 half as often. Gray in the "
        "middle is chance.",
        "A rare expert's cells are noise, and documents of different load lift the ratios by themselves; the table "
        "lists frequent pairs, chosen on one part of the documents and scored on the other.",
    ),
)

NOTES = {note.name: note for note in _ALL}
