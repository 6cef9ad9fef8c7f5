"""The laws: formula, parameters, gradient and source of each, a row of LAWS.

A law predicts one column (its output: loss, error, lr, …) from others (its inputs). Coefficients
are fitted as logarithms, which keeps them positive; exponents as they are. `evaluate` gives the
logarithm of the prediction and its derivatives for any number of parameter vectors at once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from t5x_lite.scaling import jet
from t5x_lite.scaling.jet import Jet

Columns = Mapping[str, np.ndarray]   # {column: [R]}

_EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8)


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter of a law, on the scale that it is fitted on."""

    name: str
    log: bool = False            # fitted as its logarithm
    low: float = -np.inf         # bounds on the fitted scale
    high: float = np.inf
    starts: tuple[float, ...] = ()

    def natural(self, fitted: float) -> float:
        """The value that is reported."""
        return float(np.exp(fitted)) if self.log else float(fitted)

    def fitted(self, natural: float) -> float:
        """The value that is fitted."""
        return float(np.log(natural)) if self.log else float(natural)


def coefficient(name: str) -> Param:
    """A positive factor of any size."""
    return Param(name, log=True, low=-90.0, high=200.0)


def exponent(name: str, low: float = 0.0, high: float = 3.0) -> Param:
    """A power, positive where the law writes the sign."""
    return Param(name, low=low, high=high, starts=_EXPONENTS)


@dataclasses.dataclass(frozen=True)
class Law:
    """What all laws share. starts: [S, P] where fits begin."""

    name: str
    formula: str
    source: str
    inputs: tuple[str, ...]
    params: tuple[Param, ...]
    output: str = "loss"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(p.name for p in self.params)

    def evaluate(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        """theta [..., P] -> (log prediction [..., R], its derivatives [..., P, R])."""
        raise NotImplementedError

    def starts(self, x: Columns, y: np.ndarray) -> np.ndarray:
        """[S, P]: a grid over what each parameter names."""
        return np.array(list(itertools.product(*(p.starts for p in self.params))))

    def predict(self, values: Mapping[str, float], x: Columns) -> np.ndarray:
        """The prediction [R] at natural parameters {name: value}."""
        theta = np.array([p.fitted(values[p.name]) for p in self.params])
        return np.exp(self.evaluate(theta, x)[0])

    def exponents(self, values: Mapping[str, float]) -> dict[str, float]:
        """What follows for the compute-optimal model, where the law says something about it."""
        return {}


@dataclasses.dataclass(frozen=True)
class Term:
    """coefficient x product over columns of column^(sign x exponent)."""

    coefficient: str
    powers: tuple[tuple[str, str, float], ...] = ()   # (column, exponent's name, sign)


@dataclasses.dataclass(frozen=True)
class SumLaw(Law):
    """A sum of powers. Linear in its coefficients, so that fits may search the exponents alone."""

    terms: tuple[Term, ...] = ()

    def _weights(self) -> tuple[np.ndarray, np.ndarray]:
        """[K, P] which coefficient a term has, and [K, P, I] the signs of exponents by input."""
        place = {name: i for i, name in enumerate(self.names)}
        factors = np.zeros((len(self.terms), len(self.params)))
        signs = np.zeros((len(self.terms), len(self.params), len(self.inputs)))
        for k, term in enumerate(self.terms):
            factors[k, place[term.coefficient]] = 1
            for column, power, sign in term.powers:
                signs[k, place[power], self.inputs.index(column)] = sign
        return factors, signs

    def evaluate(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        factors, signs = self._weights()
        logs = np.stack([np.log(x[name]) for name in self.inputs])
        design = factors[:, :, None] + np.einsum("kpi,ir->kpr", signs, logs)    # [K, P, R]
        terms = np.tensordot(theta, design, axes=(-1, 1))                      # [..., K, R]
        top = terms.max(axis=-2, keepdims=True)
        total = top + np.log(np.exp(terms - top).sum(axis=-2, keepdims=True))
        shares = np.exp(terms - total)
        return total[..., 0, :], np.einsum("...kr,kpr->...pr", shares, design)

    def centred(self, x: Columns) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs over their geometric means, and the [P, P] matrix that takes parameters fitted on
        them back: coefficients then say a term's size amid the data, and hardly vary with the
        exponents."""
        factors, signs = self._weights()
        means = np.array([np.log(x[name]).mean() for name in self.inputs])
        back = np.eye(len(self.params))
        for k in range(len(self.terms)):
            back[factors[k].argmax()] -= signs[k] @ means
        scaled = {n: x[n] / np.exp(m) for n, m in zip(self.inputs, means, strict=True)}
        return scaled, back

    def starts(self, x: Columns, y: np.ndarray) -> np.ndarray:
        """Exponents from a grid; each term a share of the middle output amid the data."""
        scaled, back = self.centred(x)
        factors = {term.coefficient for term in self.terms}
        grids = []
        for param in self.params:
            level = np.log(np.median(y))
            grids.append(tuple(level + np.log(share) for share in (0.1, 0.4, 0.8))
                         if param.name in factors else param.starts)
        theta = np.array(list(itertools.product(*grids)))
        return theta @ back.T

    def basis(self, theta: np.ndarray, x: Columns) -> np.ndarray:
        """[K, R]: the terms without their coefficients, at the exponents of theta [P]."""
        _, signs = self._weights()
        logs = np.stack([np.log(x[name]) for name in self.inputs])
        return np.exp(np.einsum("kpi,p,ir->kr", signs, theta, logs))

    def exponents(self, values: Mapping[str, float]) -> dict[str, float]:
        if self.name not in ("hoffmann", "krajewski"):
            return {}
        total = values["alpha"] + values["beta"]
        if not total:   # a loss that no size and no text lowers: every model is as good
            return {}
        return {"N_of_C": values["beta"] / total, "D_of_C": values["alpha"] / total}


@dataclasses.dataclass(frozen=True)
class FormulaLaw(Law):
    """A law written once on Jets. write: (parameters, columns) -> the log of the prediction."""

    write: Callable[[list[Jet], Columns], Jet] = None
    guess: Callable[[Columns, np.ndarray], np.ndarray] | None = None
    derive: Callable[[Mapping[str, float]], dict[str, float]] | None = None   # see `exponents`

    def evaluate(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        found = self.write(jet.parameters(theta, len(x[self.inputs[0]])), x)
        return found.value, found.slope

    def starts(self, x: Columns, y: np.ndarray) -> np.ndarray:
        return self.guess(x, y) if self.guess else super().starts(x, y)

    def exponents(self, values: Mapping[str, float]) -> dict[str, float]:
        return self.derive(values) if self.derive else {}


def power(name: str, column: str, source: str, *, floor: bool = False, output: str = "loss",
          rising: bool = False, steepest: float = 3.0) -> SumLaw:
    """A column^-alpha, plus E where there is a floor; alpha is at most `steepest`."""
    sign = 1.0 if rising else -1.0
    terms = [Term("A", ((column, "alpha", sign),))]
    params = [coefficient("A"), exponent("alpha", high=steepest)]
    formula = f"{output} = A {column}^{'' if rising else '-'}alpha"
    if floor:
        terms.insert(0, Term("E"))
        params.insert(0, coefficient("E"))
        formula = f"{output} = E + A {column}^-alpha"
    return SumLaw(name, formula, source, (column,), tuple(params), output, tuple(terms))


def product(name: str, output: str, columns: Mapping[str, str], source: str) -> SumLaw:
    """k times powers of several columns, of either sign."""
    params = (coefficient("k"), *(Param(p, low=-3, high=3, starts=(-0.6, 0.0, 0.6))
                                  for p in columns.values()))
    formula = f"{output} = k " + " ".join(f"{c}^{p}" for c, p in columns.items())
    term = Term("k", tuple((c, p, 1.0) for c, p in columns.items()))
    return SumLaw(name, formula, source, tuple(columns), params, output, (term,))


def _kaplan_nd(p: list[Jet], x: Columns) -> Jet:
    log_nc, log_dc, alpha_n, alpha_d = p
    size = ((log_nc - np.log(x["params"])) * (alpha_n / alpha_d)).exp()
    return (size + (log_dc - np.log(x["tokens"])).exp()).log() * alpha_d


def _muennighoff(p: list[Jet], x: Columns) -> Jet:
    log_e, log_a, log_b, alpha, beta, repeats_d, repeats_n = p
    seen, unique, size = x["tokens"], np.minimum(x["unique_tokens"], x["tokens"]), x["params"]
    log_g = (alpha.log() + log_a - beta.log() - log_b) / (alpha + beta)
    log_needed = log_g + beta / alpha * (log_g + np.log(unique))
    needed = log_needed.minimum(np.log(size)).exp()
    excess = size / needed - 1.0
    tokens = unique * (1 + repeats_d * (1 - (-((seen / unique - 1) / repeats_d)).exp()))
    params = needed * (1 + repeats_n * (1 - (-(excess / repeats_n)).exp()))
    return (log_e.exp() + (log_a - alpha * params.log()).exp()
            + (log_b - beta * tokens.log()).exp()).log()


def _clark_starts(x: Columns, y: np.ndarray) -> np.ndarray:
    size = np.log10(x["params"])
    found = []
    for first, most in itertools.product((1.1, 1.5, 2.0, 3.0), (64.0, 256.0, 1024.0)):
        experts = np.log10(1 / (1 / (x["experts"] - 1 + 1 / (1 / first - 1 / most)) + 1 / most))
        design = np.stack([size, experts, size * experts, np.ones_like(size)], axis=1)
        linear = np.linalg.lstsq(design, np.log10(y), rcond=None)[0]
        found.append([*linear, np.log(first - 1), np.log(most)])
    return np.array(found)


def _clark(p: list[Jet], x: Columns) -> Jet:
    a, b, c, d, log_first, log_most = p
    first, most = log_first.exp() + 1, log_most.exp()
    experts = x["experts"] - 1 + 1 / (1 / first - 1 / most)
    log_e = (1 / experts + 1 / most).log() * (-1 / np.log(10))
    size = np.log10(x["params"])
    return (a * size + b * log_e + c * log_e * size + d) * np.log(10)


def _broken(p: list[Jet], x: Columns) -> Jet:
    log_a, log_b, c0, c1, log_d, log_f = p
    size = np.log(x["tokens"])
    bend = ((size - log_d) * (-log_f).exp()).log1p_exp()
    return (log_a.exp() + (log_b - c0 * size - c1 * log_f.exp() * bend).exp()).log()


def _broken_starts(x: Columns, y: np.ndarray) -> np.ndarray:
    size = np.log(x["tokens"])
    found = []
    for c0, c1, place, width, floor in itertools.product(
            (-0.2, 0.02, 0.3), (0.2, 0.8, 2.0), (0.25, 0.5, 0.75), (0.1, 0.3, 1.0), (1e-3, 0.5)):
        middle = size.min() + place * np.ptp(size)
        found.append([np.log(y.min() * floor), np.log(y[size.argmin()]) + c0 * size.min(), c0, c1,
                      middle, np.log(width)])
    return np.array(found)


def _steps_of_batch(p: list[Jet], x: Columns) -> Jet:
    log_steps, log_examples = p
    return (log_steps.exp() + (log_examples - np.log(x["batch"])).exp()).log()


def _steps_of_batch_starts(x: Columns, y: np.ndarray) -> np.ndarray:
    examples = np.log((x["batch"] * y).min())
    return np.array([[np.log(y.min() * a), examples + np.log(b)]
                     for a, b in itertools.product((0.3, 0.6, 0.95), repeat=2)])


def _sigmoid(p: list[Jet], x: Columns) -> Jet:
    rise, steep, middle, floor = p
    return (rise / (1 + (steep * (x["loss"] - middle)).exp()) + floor).log()


def _sigmoid_starts(x: Columns, y: np.ndarray) -> np.ndarray:
    middles = np.quantile(x["loss"], (0.1, 0.5, 0.9))
    return np.array(list(itertools.product((0.5 * np.ptp(y), 1.2 * np.ptp(y)), (1.0, 4.0, 12.0),
                                           middles, (0.9 * y.min(),))))


def _error(p: list[Jet], x: Columns) -> Jet:
    floor, log_k, gamma = p
    return (floor - (log_k - gamma * x["loss"]).exp()).log()


def _error_starts(x: Columns, y: np.ndarray) -> np.ndarray:
    found = []
    for gamma, extra in itertools.product((0.3, 0.8, 1.5, 3.0), (0.02, 0.2)):
        gap = max(np.median(y.max() + extra - y), 1e-3)
        found.append([y.max() + extra, np.log(gap) + gamma * np.median(x["loss"]), gamma])
    return np.array(found)


HOFFMANN = SumLaw(
    "hoffmann", "loss = E + A params^-alpha + B tokens^-beta", "Hoffmann et al. 2022, approach 3",
    ("params", "tokens"),
    (coefficient("E"), coefficient("A"), coefficient("B"), exponent("alpha"), exponent("beta")),
    "loss", (Term("E"), Term("A", (("params", "alpha", -1.0),)),
             Term("B", (("tokens", "beta", -1.0),))))

_LOG = dataclasses.replace(coefficient("_"), starts=(8.0, 16.0, 24.0, 32.0))
_KAPLAN_ND_PARAMS = (dataclasses.replace(_LOG, name="N_c"), dataclasses.replace(_LOG, name="D_c"),
                     exponent("alpha_N", 1e-3), exponent("alpha_D", 1e-3))

LAWS: dict[str, Law] = {law.name: law for law in (
    power("kaplan_n", "params", "Kaplan et al. 2020, eq. 1.1"),
    power("kaplan_d", "tokens", "Kaplan et al. 2020, eq. 1.2"),
    power("kaplan_c", "flops", "Kaplan et al. 2020, eq. 1.3 (C_min where that is the column)"),
    FormulaLaw("kaplan_nd", "loss = ((N_c/params)^(alpha_N/alpha_D) + D_c/tokens)^alpha_D",
               "Kaplan et al. 2020, eq. 1.5", ("params", "tokens"), _KAPLAN_ND_PARAMS,
               write=_kaplan_nd),
    SumLaw("kaplan_ns", "loss = A params^-alpha_N + S steps^-alpha_S",
           "Kaplan et al. 2020, eq. 1.6; steps: S_min", ("params", "steps"),
           (coefficient("A"), coefficient("S"), exponent("alpha_N"), exponent("alpha_S")), "loss",
           (Term("A", (("params", "alpha_N", -1.0),)), Term("S", (("steps", "alpha_S", -1.0),)))),
    HOFFMANN,
    power("hestness", "tokens", "Hestness et al. 2017: a learning curve", floor=True),
    power("hestness_n", "params", "Hestness et al. 2017 with a floor, over parameters", floor=True),
    power("frontier", "flops", "Kaplan's L(C) with a floor", floor=True),
    power("n_of_c", "flops", "Hoffmann et al. 2022: optimal parameters", output="params",
          rising=True),
    power("d_of_c", "flops", "Hoffmann et al. 2022: optimal tokens", output="tokens", rising=True),
    FormulaLaw("muennighoff",
               "loss = E + A (U_N + U_N R_N*(1 - e^(-R_N/R_N*)))^-alpha "
               "+ B (U_D + U_D R_D*(1 - e^(-R_D/R_D*)))^-beta",
               "Muennighoff et al. 2023, eq. 5; unique_tokens: U_D",
               ("params", "tokens", "unique_tokens"),
               (dataclasses.replace(coefficient("E"), starts=(0.0, 0.6)),
                dataclasses.replace(coefficient("A"), starts=(4.0, 6.0, 8.0)),
                dataclasses.replace(coefficient("B"), starts=(4.0, 7.0, 9.0)),
                Param("alpha", low=1e-3, high=3, starts=(0.25, 0.4)),
                Param("beta", low=1e-3, high=3, starts=(0.25, 0.4)),
                Param("R_D", low=1e-2, high=1e4, starts=(2.0, 15.0, 60.0)),
                Param("R_N", low=1e-2, high=1e4, starts=(2.0, 6.0, 30.0))), write=_muennighoff),
    SumLaw("gadre", "loss = E + A params^-eta + B tokens^-eta",
           "Gadre et al. 2024, eq. 4: loss under over-training", ("params", "tokens"),
           (coefficient("E"), coefficient("A"), coefficient("B"), exponent("eta")), "loss",
           (Term("E"), Term("A", (("params", "eta", -1.0),)),
            Term("B", (("tokens", "eta", -1.0),)))),
    FormulaLaw("gadre_error", "error = e - k exp(-gamma loss)", "Gadre et al. 2024, eq. 5",
               ("loss",), (Param("e", low=0, high=100), coefficient("k"),
                           Param("gamma", low=0, high=50)), "error", _error, _error_starts),
    FormulaLaw("clark", "log10 loss = a log10 N + b log10 E^ + c log10 N log10 E^ + d",
               "Clark et al. 2022; params: dense ones, experts: 1 for a dense run",
               ("params", "experts"),
               (*(Param(n, low=-5, high=9) for n in "abcd"), Param("E_start_less_1", True, -9, 6),
                Param("E_max", True, 0, 14)), write=_clark, guess=_clark_starts),
    SumLaw("krajewski", "loss = c + (g granularity^-gamma + a) params^-alpha + b tokens^-beta",
           "Krajewski et al. 2024", ("params", "tokens", "granularity"),
           (coefficient("c"), coefficient("g"), coefficient("a"), coefficient("b"),
            exponent("gamma"), exponent("alpha"), exponent("beta")), "loss",
           (Term("c"), Term("g", (("granularity", "gamma", -1.0), ("params", "alpha", -1.0))),
            Term("a", (("params", "alpha", -1.0),)), Term("b", (("tokens", "beta", -1.0),)))),
    product("hernandez", "tokens_transferred", {"tokens": "alpha", "params": "beta"},
            "Hernandez et al. 2021: D_T = k D_F^alpha N^beta; the multiplier is (D_F + D_T)/D_F"),
    product("step_law_lr", "lr", {"params": "alpha", "tokens": "beta"},
            "Li et al. 2025 (Step Law)"),
    product("step_law_batch", "batch", {"tokens": "beta"}, "Li et al. 2025 (Step Law)"),
    power("critical_batch", "loss", "McCandlish et al. 2018; Kaplan et al. 2020, eq. 1.4",
          output="batch", steepest=20.0),     # a power of the loss: 1/.21 = 4.8 in Kaplan et al.
    FormulaLaw("steps_of_batch", "steps = S_min + E_min / batch, that is S/S_min - 1 = 1/(E/E_min - 1)",
               "McCandlish et al. 2018, eq. 2.11: steps to one loss by batch; B_crit = E_min / S_min",
               ("batch",), (coefficient("S_min"), coefficient("E_min")), "steps", _steps_of_batch,
               _steps_of_batch_starts, lambda v: {"B_crit": v["E_min"] / v["S_min"]}),
    FormulaLaw("broken", "loss = a + b tokens^-c0 (1 + (tokens/d)^(1/f))^(-c1 f)",
               "Caballero et al. 2023, one break", ("tokens",),
               (Param("a", True, -40, 5), Param("b", True, -60, 60), Param("c0", low=-2, high=5),
                Param("c1", low=-5, high=9), Param("d", True, -10, 90), Param("f", True, -6, 3)),
               write=_broken, guess=_broken_starts),
    FormulaLaw("sigmoid", "accuracy = a / (1 + exp(k (loss - L0))) + b",
               "Bhagia et al. 2024, step 2", ("loss",),
               (Param("a", low=0, high=100), Param("k", low=0, high=100),
                Param("L0", low=-10, high=50), Param("b", low=0, high=100)), "accuracy", _sigmoid,
               _sigmoid_starts),
)}
