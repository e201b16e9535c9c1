"""The steps of odeint: tableaux, fixed and adaptive steps, and the control of step sizes."""
