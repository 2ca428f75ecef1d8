"""A model from its files: conversion, quantisation, placement on the device."""
