"""How rows are to be drawn, as two tables of float64 that travel to the device together.

`rows_RF` has one row of numbers per row of logits, `edits_EF` one per logit that is changed before
the draw: sorted by row, then token, each pair at most once. A table may be longer than what is in
it: the last row's `END_EDIT` says how many edits there are, and `PADDING` is a row that harms nobody.

Legend: `R` rows, `E` edits, `F` fields.
"""

from __future__ import annotations

# Fields of `rows_RF`. The inverse temperature is 0 where the best token is taken.
INVERSE_TEMPERATURE, UNIFORM, TOP_K, TOP_P, LOG_MIN_P, FIRST_EDIT, END_EDIT = range(7)
NUM_ROW_FIELDS = 7
# Everything off: no top-k (0), no top-p (1), no min-p (-inf).
PADDING = (0.0, 0.0, 0.0, 1.0, float("-inf"), 0.0, 0.0)

# Fields of `edits_EF`. In this order: the bias is added; a positive logit is divided by the penalty,
# another multiplied with it; the addend is added (-inf bans the token).
ROW, TOKEN, BIAS, PENALTY, ADDEND = range(5)
NUM_EDIT_FIELDS = 5

# Fields of the result: the token, its log-probability under the unedited logits at temperature 1, and
# under the distribution that it was drawn from.
DRAWN_TOKEN, LOGPROB, SAMPLED_LOGPROB = range(3)
NUM_DRAWN_FIELDS = 3
