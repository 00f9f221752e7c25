"""A training on paper: parameters, memory, FLOPs, time, cost and disk, before anything is started."""

from .figures import Plan, Row, plan

__all__ = ["Plan", "Row", "plan"]
