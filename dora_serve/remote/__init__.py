"""Runs, bases and outputs at URLs."""
