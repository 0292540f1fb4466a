"""From bounds to verdicts: certificates of single samples, on disk, and computed again."""

from swiftsure.certificates._budget import Promise, within_certified_macs
from swiftsure.certificates._certify import METHODS, Certificate, certify, verified_accuracy
from swiftsure.certificates._precision import certifying
from swiftsure.certificates._recheck import Recheck, recheck
from swiftsure.certificates._rounding import FLOOR, SAFETY, rounding_slack
from swiftsure.certificates._slopes import SLOPES_NAME
from swiftsure.certificates._storage import NAME, CertificateFile, read, write

__all__ = [
    "FLOOR",
    "METHODS",
    "NAME",
    "SAFETY",
    "SLOPES_NAME",
    "Certificate",
    "CertificateFile",
    "Promise",
    "Recheck",
    "certify",
    "certifying",
    "read",
    "recheck",
    "rounding_slack",
    "verified_accuracy",
    "within_certified_macs",
    "write",
]
