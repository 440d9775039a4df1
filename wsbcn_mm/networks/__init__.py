"""Networks of anybody, made of torch's modules: what they are made of, do, and can be turned into.

Nothing here knows the layers of this package: conversion, folding, audit and diagnostics do.
"""
