"""Operations of the model, one folder each: a readable reference and, later, a Triton kernel.

The package's public function of an operation checks shapes and chooses an
implementation. References are plain torch and accumulate in float32 (float64
when given float64, which the tests use as their oracle).
"""
