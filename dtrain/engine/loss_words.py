"""What is said of losses that are no mean over the samples, and the functions by which they show."""

from __future__ import annotations

FUNCTIONS = {
    "Sqrt": "the square root",
    "Rsqrt": "the square root",
    "Pow": "a power",
    "Log": "the logarithm",
    "Log1P": "the logarithm",
    "Exp": "the exponential",
    "Abs": "the absolute value",
    "Reciprocal": "the reciprocal",
}
STATISTICS = {
    "Std": "the standard deviation",
    "Var": "the variance",
    "LinalgVectorNorm": "the norm",
    "Norm": "the norm",
    "Max": "the maximum",
    "Min": "the minimum",
    "Median": "the median",
    "Logsumexp": "a log-sum-exp",
}

GROUPING = frozenset(("IndexAdd", "ScatterAdd"))

AVERAGED = "The losses of several ranks or micro-batches are averaged with the weights of their samples"
COUNT = (
    "Return dtrain.Mean(total, count), with the sum of these as the count, and leave backward() and the optimizer's "
    "step to dtrain."
)
MIXED = "What a part of the batch gives for it is another value than the whole batch gives."
BETWEEN_SAMPLES = (
    "what a sample adds to it depends on other samples of the batch, as in x - x.mean(0), softmax(0) or z @ z.T"
)
DIFFERING = (
    "it is the mean over %g values for each sample on the first rank and over %g on the last one, as where batches are "
    "padded to their longest sample"
)
FOLLOWS = (
    "a part of it is multiplied by %g, which follows the number of samples, %d here: as a constant it would be right, "
    "or divided by that number"
)
GROUPED = "it adds up samples by groups (index_add or scatter_add), and then the groups"
LEAVE_OUT = (
    "Return dtrain.Mean(total, count) of the values that count, without padding, and leave backward() and the "
    "optimizer's step to dtrain; or give all samples equally many."
)
ALONE = "One rank without accumulation computes it of the whole batch; `dtrain check parity` shows the difference."
