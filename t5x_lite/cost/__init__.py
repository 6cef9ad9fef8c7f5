"""What a run costs: FLOPs, bytes, communication, time, energy, carbon and money.

hardware  cited figures of TPUs and GPUs
flops     FLOPs and parameters from the structure of the model
hlo       the collectives of a compiled program
roofline  the fastest a step can be (a bound, never a prediction)
energy    days, MWh, tCO2e and price of a run
power     watts measured on this machine, where it reports them
usage     the same figures for a run as it trains
tables    all of it as plain text, a screen wide

None of it needs an accelerator, or JAX.
"""
